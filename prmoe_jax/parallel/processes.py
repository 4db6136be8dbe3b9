"""Several processes as one run: how they find each other, and how they end together."""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from prmoe_jax.errors import UserError

# A process that says nothing for so long is lost, and the others end.
HEARTBEAT_SECONDS = 30
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Makes this process one of a run's, before JAX is used for anything else.

    Cloud TPU pods, GKE, SLURM and Open MPI say who belongs together; elsewhere the environment
    must, by all of `VARIABLES`.

    Raises:
      UserError: nothing says so, or the processes don't find each other.
    """
    given = [name for name in VARIABLES if name in os.environ]
    arguments = {}
    if given:
        if len(given) < len(VARIABLES):
            missing = ", ".join(name for name in VARIABLES if name not in given)
            raise UserError(f"{', '.join(given)} given without {missing}; give all or none")
        arguments = {
            "coordinator_address": os.environ[VARIABLES[0]],
            "num_processes": int(os.environ[VARIABLES[1]]),
            "process_id": int(os.environ[VARIABLES[2]]),
        }
    _keep_output_ours()
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--distributed: the processes of this run were not found ({reason}); start it on a "
            f"TPU pod, under SLURM or on GKE, or give {', '.join(VARIABLES)}"
        ) from error


def _keep_output_ours() -> None:
    """Sends to standard error what libraries write on standard output.

    Gloo, the collectives of CPUs, greets there, from several threads at once; a reader of --json
    wants JSON.
    """
    sys.stdout.flush()
    ours = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = open(ours, "w", buffering=1, encoding=sys.stdout.encoding)


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """Process 0 runs the block alone, then the others do, who find what it left on disk."""
    if jax.process_index() != 0:
        barrier(name)
    yield
    if jax.process_index() == 0:
        barrier(name)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends this process with one line where another one was lost.

    At once, since any clean-up would wait for the lost one.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).strip().splitlines()[0][:200]
        message = "another process of this run was lost; start the run again to resume it"
        print(f"prmoe: process {jax.process_index()}: {message} ({reason})", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
