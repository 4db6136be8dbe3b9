"""`python -m prmoe_jax` is `prmoe`."""

from prmoe_jax.cli import main

raise SystemExit(main())
