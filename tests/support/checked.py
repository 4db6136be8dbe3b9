"""Runs `prmoe check` at small sizes: python -m tests.support.checked FAULTS ARGUMENT...

FAULTS are names of functions below, separated by commas: each puts a fault into the machine as the
check sees it. Speed is not asserted: unless a fault makes a device many times slower, none is slow.
"""

import sys
import time

import jax

from prmoe_jax.check import kernels, rates, run, trial
from prmoe_jax.check.findings import Part
from prmoe_jax.cli import main

rates.CPU_WIDTH, rates.CPU_ARRAY_BYTES, rates.CPU_SENT_BYTES = 128, 1 << 20, 1 << 12
rates.TURN_SECONDS, rates.SLOW, trial.SLOW, trial.FILE_BYTES = 0.002, 0.2, 0.0, 1 << 16


def _wrapped(module, name: str, make) -> None:
    setattr(module, name, make(getattr(module, name)))


def _in_float32(cases):
    """Some kernels in both dtypes, the others in float32, which compiles in half the time."""
    both = "dispatch gather", "attention blocks", "exchange hierarchical"

    def fewer(devices):
        for case in cases(devices):
            yield case if case.name in both else case._replace(dtypes=("float32",))

    return fewer


_wrapped(kernels, "cases", _in_float32)


def only_rates() -> None:
    """Leaves out what the other faults have nothing to do with."""
    kernels.check = trial.check = lambda *_: Part([], {})


def no_kernels() -> None:
    kernels.check = lambda: Part([], {})


def busy_device() -> None:
    """Another program keeps this process's third device busy, for twenty times as long."""

    def make(product):
        def busy_there(device, dtype):
            made = product(device, dtype)
            return _busy(*made) if device in jax.local_devices()[2:3] else made

        return busy_there

    _wrapped(rates, "_product", make)


def busy_process_1() -> None:
    """Another program keeps all memory of the second process's host busy."""

    def make(copy):
        return lambda device: _busy(*copy(device)) if jax.process_index() == 1 else copy(device)

    _wrapped(rates, "_copy", make)


def _busy(run, *rest):
    def slower():
        begun = time.perf_counter()
        result = jax.block_until_ready(run())
        end = begun + 20 * (time.perf_counter() - begun)
        while time.perf_counter() < end:
            pass
        return result

    return slower, *rest


def another_version() -> None:
    """The second process has another Orbax."""

    def make(versions):
        def other():
            found = versions()
            return found | {"orbax-checkpoint": "0.1"} if jax.process_index() else found

        return other

    _wrapped(run, "versions", make)


def miscalculating_device() -> None:
    """A row of each product of the first device is off by a tenth."""
    _miscalculating(lambda device: device == jax.local_devices()[0])


def miscalculating_process_1() -> None:
    """A row of each product of the second process is off by a tenth."""
    _miscalculating(lambda device: device.process_index == 1)


def _miscalculating(faulty) -> None:
    matmul = jax.numpy.matmul

    def make(product):
        def on(device, dtype):
            wrong = lambda x, y: matmul(x, y).at[-1].multiply(1.1)  # noqa: E731
            jax.numpy.matmul = wrong if faulty(device) else matmul
            try:
                return product(device, dtype)
            finally:
                jax.numpy.matmul = matmul

        return on

    _wrapped(rates, "_product", make)


def losing_all_to_all() -> None:
    """The first half of each row gets lost."""

    def make(all_to_all):
        return lambda x, *how, **options: (
            all_to_all(x, *how, **options).at[:, : x.shape[1] // 2].set(0)
        )

    _wrapped(jax.lax, "all_to_all", make)


if __name__ == "__main__":
    for fault in filter(None, sys.argv[1].split(",")):
        globals()[fault]()
    sys.exit(main(["check", *sys.argv[2:]]))
