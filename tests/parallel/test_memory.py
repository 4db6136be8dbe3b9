"""How much memory is free, by the files of a system."""

import jax
import pytest

from prmoe_jax.parallel.memory import free_bytes


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [
        ({}, {}, 3 << 20),
        ({"memory.max": "max"}, {"memory.current": "7"}, 3 << 20),
        ({"memory.max": "2000000"}, {"memory.current": "500000"}, 1_500_000),
        ({"memory.max": "500"}, {"memory.current": "600"}, 0),
        (
            {"memory/memory.limit_in_bytes": "900000"},
            {"memory/memory.usage_in_bytes": "1"},
            899_999,
        ),
    ],
)
def test_free_memory_of_a_container(limit, used, free, tmp_path, monkeypatch):
    """A container's limit counts if it is below what the host has; CPU devices share it."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9999 kB\nMemAvailable:    3072 kB\n")
    for name, text in (limit | used).items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert free_bytes(tmp_path) == free // jax.local_device_count()
    monkeypatch.setattr(jax, "local_device_count", lambda: 3)
    assert free_bytes(tmp_path) == free // 3


def test_free_memory_of_this_machine():
    assert 2**20 < free_bytes() < 2**50
