"""The memory that is free for a program's arrays."""

import os
from pathlib import Path

import jax

# Files of a cgroup, version 2 and 1, that hold a container's limit and what it uses.
_LIMITS = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_bytes(root: Path = Path("/")) -> int:
    """The bytes that JAX can still allocate on this process's first device.

    CPU devices share the host's free memory, which a container may limit. `root` holds the
    system's files.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats.get("bytes_limit", 1 << 62) - stats.get("bytes_in_use", 0)
    free = [_available(root)]
    for names in _LIMITS:
        texts = [path.read_text().strip() for path in map(root.joinpath, names) if path.exists()]
        if len(texts) == 2 and all(text.isdigit() for text in texts):  # else 'max': no limit
            free.append(int(texts[0]) - int(texts[1]))
    return max(0, min(free)) // jax.local_device_count()


def _available(root: Path) -> int:
    """Linux's own estimate, which counts caches as free; elsewhere all of the memory."""
    path = root / "proc/meminfo"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
