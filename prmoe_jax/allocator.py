"""The C library's allocator, told to keep the memory that XLA frees after every CPU step."""

import ctypes
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = -1


def keep_freed_memory() -> bool:
    """Makes this process reuse large buffers instead of asking the kernel for new ones.

    XLA's CPU runtime allocates a step's buffers anew each time. By default glibc takes large
    ones from the kernel and gives them back, so every step pays for zeroed pages: for layers of
    many experts more than for the arithmetic. Threads share one arena, since the others cannot
    grow past 64 MB. Call it before JAX starts its threads. Memory in use never falls again, so this
    is for what runs the same steps over and over. The command line does it; a notebook may, first
    thing.

    Returns:
      Whether glibc took the settings; False without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER, _M_ARENA_MAX: 1}
    return all([mallopt(name, value) for name, value in settings.items()])
