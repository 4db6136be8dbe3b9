"""The dtypes of products and of activations, by platform and by the CPU's instructions."""

import pathlib

import pytest

from prmoe_jax.config.schema import ExecutionConfig
from prmoe_jax.nn import precision
from prmoe_jax.nn.precision import Precision


@pytest.mark.parametrize(
    ("dtype", "products", "platform", "training", "expected"),
    [
        ("bfloat16", "bfloat16", "cpu", True, ("bfloat16", "float32")),
        ("bfloat16", "float32", "cpu", True, ("float32", "float32")),
        ("bfloat16", "bfloat16", "cpu", False, ("float32", "float32")),
        ("float32", "bfloat16", "cpu", True, ("float32", "float32")),
        ("bfloat16", "float32", "tpu", True, ("bfloat16", "bfloat16")),
        ("bfloat16", "float32", "gpu", False, ("bfloat16", "bfloat16")),
        ("float32", "bfloat16", "tpu", True, ("float32", "float32")),
    ],
)
def test_dtypes(dtype, products, platform, training, expected):
    execution = ExecutionConfig(cpu_products=products)
    assert Precision.of(dtype, execution, platform, training) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f avx512_bf16", "bfloat16"),
        ("fpu amx_bf16 amx_tile", "bfloat16"),
        ("fpu avx2 avx512f", "float32"),
        (None, "float32"),
    ],
)
def test_auto_follows_the_instructions_of_the_cpu(flags, expected, monkeypatch):
    def read(path):
        if flags is None:
            raise FileNotFoundError(path)
        return f"processor: 0\nflags: {flags}\n"

    monkeypatch.setattr(pathlib.Path, "read_text", read)
    precision.multiplies_bfloat16.cache_clear()
    assert precision.resolve_products("auto") == expected
    assert precision.resolve_products("bfloat16") == "bfloat16"
    assert precision.resolve_products("float32") == "float32"
    monkeypatch.undo()
    precision.multiplies_bfloat16.cache_clear()
