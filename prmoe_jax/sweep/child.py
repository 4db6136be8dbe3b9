"""One run of a sweep, in its own process, which does not outlive the sweep.

    python -m prmoe_jax.sweep.child ARGUMENTS         # same as `prmoe ARGUMENTS`

The sweep holds the other end of this process's standard input and never writes to it. The input
ends when the sweep ends, even by `kill -9`; the run then saves a checkpoint and stops, as on
SIGTERM.
"""

import os
import runpy
import signal
import threading


def stop_with_the_sweep() -> None:
    """Waits until standard input ends, then sends this process SIGTERM."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=stop_with_the_sweep, daemon=True).start()
    runpy.run_module("prmoe_jax", run_name="__main__")
