"""Where things are, wherever the tests are started."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
GOLDENS = REPOSITORY / "tests" / "goldens"
