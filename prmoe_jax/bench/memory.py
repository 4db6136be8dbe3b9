"""Whether what a benchmark asks for can fit at all, before anything is made or compiled."""

import os

from prmoe_jax.errors import UserError


def check(flag: str, needed: int, room: int | None = None) -> None:
    """Refuses a size that needs more than there is.

    Args:
      flag: as it was given, such as '--batch=8'.
      needed: bytes, at the least.
      room: bytes there are, this machine's memory unless given.

    Raises:
      UserError: it doesn't fit.
    """
    if room is None:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > room:
        raise UserError(
            f"{flag} needs {needed / 2**30:,.0f} GiB or more, there are {room / 2**30:,.0f}; "
            "use a smaller one"
        )
