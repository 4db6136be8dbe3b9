"""Faults: a full disk, a wait without an end, an altered file."""

import contextlib
import resource
import signal


@contextlib.contextmanager
def file_size_limit(size):
    """While active, writing past `size` bytes of a file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def at_most(seconds):
    """Fails instead of waiting for ever."""

    def fail(number, frame):
        raise AssertionError(f"no end after {seconds} s")  # a TimeoutError is an OSError

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def altered(content):
    """Another byte in the last number of a file."""
    return content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
