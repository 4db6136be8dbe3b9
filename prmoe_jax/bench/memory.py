"""Checks that a benchmark's arrays can fit into memory, before they are made."""

import os

import jax

from prmoe_jax.errors import UserError


def check(flag: str, needed: int, room: int | None = None) -> None:
    """Refuses a size that needs more memory than there is.

    Args:
      flag: the flag as the user gave it, such as '--batch=8'.
      needed: a lower bound of the bytes that it needs.
      room: available bytes. The default is JAX's limit for the first device; on CPUs it is this
        machine's memory.
    """
    if room is None:
        room = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        room = room or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > room:
        raise UserError(
            f"{flag} needs {needed / 2**30:,.0f} GiB or more, there are {room / 2**30:,.0f}; "
            "use a smaller one"
        )
