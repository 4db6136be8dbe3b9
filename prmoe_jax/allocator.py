"""Makes the C library's allocator keep the memory that XLA frees after every CPU step."""

import ctypes
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = -1


def keep_freed_memory() -> None:
    """Makes this process reuse large buffers instead of asking the kernel for new ones.

    XLA's CPU runtime allocates the buffers anew at every step. By default glibc takes large ones
    from the kernel and gives them back, so that the kernel zeroes their pages at every step; with
    many experts this takes longer than the arithmetic. All threads share one arena, since the
    others cannot grow past 64 MB. Call this before JAX starts its threads, and only where the same
    steps run over and over, since the process never gives memory back. It needs glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1)):
            mallopt(name, value)
