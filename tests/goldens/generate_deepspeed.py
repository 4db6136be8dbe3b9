"""Writes what DeepSpeed's own MoE layer computes, for tests that run without torch.

    pip install -e '.[interop]'   # the CPU is enough
    python tests/goldens/generate_deepspeed.py [--out DIR]

The files in `deepspeed/` are from DeepSpeed 0.19.8 and torch 2.13.0 (versions are in each
file's `settings`). Every case is one `deepspeed.moe.layer.MoE`, forward and backward of
Σ y · cotangent + aux_loss, in float32, with our names and orientation of parameters; `d_NAME`
is the gradient of NAME. `capacities.npz` tabulates DeepSpeed's capacity alone.

Shapes: S tokens, D model width, F hidden width, E experts, C capacity.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import zlib
from pathlib import Path
from unittest import mock

import deepspeed
import numpy as np
import torch
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE

D_MODEL, D_FF = 8, 12
VERSIONS = {"deepspeed": deepspeed.__version__, "torch": torch.__version__}


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer and its batch; the last three fields choose the data and check the result."""

    name: str
    tokens: int = 24
    experts: int = 4
    top_k: int = 1
    capacity_factor: float = 1.0  # in training
    eval_capacity_factor: float = 1.0
    min_capacity: int = 4
    drop_tokens: bool = True
    priority: str = "position"  # who stays when an expert is full: position|probability|random
    residual: bool = False
    training: bool = True
    skew: float = 0.0  # how much the router prefers expert 0
    drops: bool = True  # whether an expert must overflow
    expected_capacity: int | None = None  # C, where it is the case's point


top2 = functools.partial(Case, tokens=23, experts=5, top_k=2)
top4 = functools.partial(Case, tokens=23, experts=6, top_k=4)

CASES = (
    Case("top1", expected_capacity=6),
    Case("top1_residual", residual=True),
    Case("top1_overflow", min_capacity=1, skew=0.5),
    Case("top1_ample", capacity_factor=4.0, drops=False),
    Case("top1_no_drop", drop_tokens=False, skew=0.5, drops=False),
    Case("top1_min_capacity", tokens=12, experts=8, expected_capacity=4, skew=0.5),
    # 100 / 4 · 1.2 is 30, but a little more in float32.
    Case("top1_odd", tokens=100, capacity_factor=1.2, expected_capacity=31, skew=0.2),
    Case("top1_rts", min_capacity=1, priority="random", skew=0.5),
    Case(
        "top1_eval", min_capacity=1, eval_capacity_factor=0.5, training=False, expected_capacity=3
    ),
    top2("top2"),
    top2("top2_overflow", min_capacity=1, skew=0.5),
    top2("top2_residual", residual=True),
    top2("top2_no_drop", drop_tokens=False, drops=False),
    top4("top4_probability", priority="probability", skew=0.3),
    top4("top4_position", skew=0.3),
    top4("top4_no_drop", drop_tokens=False, drops=False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "deepspeed")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print(f"{'case':18} {'S':>3} {'E':>2} {'k':>2} {'C':>3} {'dropped':>7} {'unserved':>8}")
    for case in CASES:
        arrays = golden(case)
        check(case, arrays)
        np.savez_compressed(out / f"{case.name}.npz", **arrays)
        dropped, unserved = arrays["counts"].sum() - arrays["kept"].sum(), ~arrays["kept"].any(1)
        print(
            f"{case.name:18} {case.tokens:3} {case.experts:2} {case.top_k:2} "
            f"{arrays['capacity']:3} {dropped:7} {unserved.sum():8}"
        )
    np.savez_compressed(out / "capacities.npz", **capacities())


def golden(case: Case) -> dict[str, np.ndarray]:
    """Runs DeepSpeed's layer on random parameters and inputs."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    layer = build(case, rng)
    x_SxD, cotangent_SxD = (draw(rng, case.tokens, D_MODEL) for _ in range(2))
    x_SxD = (x_SxD + 0.5).requires_grad_()  # off zero, so that the router can be skewed
    if case.priority == "random":
        uniform_SxE = torch.tensor(rng.random((case.tokens, case.experts), np.float32))
    else:  # falling: an expert keeps its first tokens
        uniform_SxE = torch.linspace(1, 0.5, case.tokens)[:, None].expand(-1, case.experts)

    with decided(case.priority, uniform_SxE):
        y_SxD, aux_loss, counts_E = layer(x_SxD)
        # The layer asks for routes in compact form; the dense form shows C and who was kept.
        _, weights_SxExC, kept_SxExC, _ = layer.deepspeed_moe.gate(x_SxD)
    ((y_SxD * cotangent_SxD).sum() + aux_loss).backward()

    parameters = in_our_layout(layer, lambda parameter: parameter.detach())
    gradients = in_our_layout(layer, lambda parameter: parameter.grad)
    tensors = {
        "x": x_SxD,
        "cotangent": cotangent_SxD,
        "y": y_SxD,
        "aux_loss": aux_loss,
        "counts": counts_E,
        "kept": kept_SxExC.any(-1),
        "weights": weights_SxExC.sum(-1),
        **parameters,
        "d_x": x_SxD.grad,
        **{f"d_{name}": gradient for name, gradient in gradients.items()},
    }
    if case.priority == "random":
        tensors["rts_uniform"] = uniform_SxE
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    settings = dataclasses.asdict(case) | {"versions": VERSIONS}
    return arrays | {"settings": json.dumps(settings), "capacity": kept_SxExC.shape[-1]}


def draw(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Standard normal float32 values; numpy's, which stay the same from version to version."""
    return torch.tensor(rng.normal(size=shape), dtype=torch.float32)


def build(case: Case, rng: np.random.Generator) -> MoE:
    """A layer whose experts, copies of each other at first, all differ."""
    expert = torch.nn.Sequential(
        torch.nn.Linear(D_MODEL, D_FF),
        torch.nn.GELU(approximate="tanh"),
        torch.nn.Linear(D_FF, D_MODEL),
    )
    layer = MoE(
        D_MODEL,
        expert,
        num_experts=case.experts,
        k=case.top_k,
        capacity_factor=case.capacity_factor,
        eval_capacity_factor=case.eval_capacity_factor,
        min_capacity=case.min_capacity,
        use_residual=case.residual,
        drop_tokens=case.drop_tokens,
        use_rts=True,
        top2_2nd_expert_sampling=False,
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(draw(rng, *parameter.shape) * parameter.shape[-1] ** -0.5)
        layer.deepspeed_moe.gate.wg.weight[0] += case.skew
    return layer.train(case.training)


@contextlib.contextmanager
def decided(priority: str, uniform_SxE: torch.Tensor):
    """Makes DeepSpeed's choice among overflowing tokens well-defined.

    For k = 1 it keeps those with the largest uniform draw, which is replaced; for k > 2 it has
    two policies, of which its layer only reaches the default.
    """
    uniform = {uniform_SxE.device: lambda shape: uniform_SxE}
    policy = "probs" if priority == "probability" else "position"
    topkgating = functools.partial(sharded_moe.topkgating, drop_policy=policy)
    with (
        mock.patch.dict(sharded_moe.exp_selection_uniform_map, uniform),
        mock.patch.object(sharded_moe, "topkgating", topkgating),
    ):
        yield


def in_our_layout(layer: MoE, of) -> dict[str, torch.Tensor]:
    """`of` every parameter, by our names: experts stacked, matrices [in, out]."""
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    tensors = {
        "w_router": of(layer.deepspeed_moe.gate.wg.weight).T,
        "w_in": torch.stack([of(expert[0].weight).T for expert in experts]),
        "b_in": torch.stack([of(expert[0].bias) for expert in experts]),
        "w_out": torch.stack([of(expert[2].weight).T for expert in experts]),
        "b_out": torch.stack([of(expert[2].bias) for expert in experts]),
    }
    if layer.use_residual:
        tensors |= {
            "mlp_w_in": of(layer.mlp[0].weight).T,
            "mlp_b_in": of(layer.mlp[0].bias),
            "mlp_w_out": of(layer.mlp[2].weight).T,
            "mlp_b_out": of(layer.mlp[2].bias),
            "w_mix": of(layer.coefficient.weight).T,
            "b_mix": of(layer.coefficient.bias),
        }
    return tensors


def check(case: Case, arrays: dict[str, np.ndarray]) -> None:
    """Asserts that a case shows what it is for, and by margins that rounding can't turn."""
    capacity, counts_E, kept_SxE = arrays["capacity"], arrays["counts"], arrays["kept"]
    assert case.expected_capacity in (None, capacity), f"{case.name}: C={capacity}"
    assert (counts_E.max() > capacity) == case.drops, f"{case.name}: C={capacity}, {counts_E}"
    np.testing.assert_array_equal(kept_SxE.sum(0), np.minimum(counts_E, capacity))

    logits_SxE = arrays["x"] @ arrays["w_router"]
    ranked_SxE = np.argsort(-logits_SxE, axis=1)
    choice_SxE = np.argsort(ranked_SxE, axis=1) < case.top_k
    np.testing.assert_array_equal(choice_SxE.sum(0), counts_E)
    gaps_SxK = -np.diff(np.take_along_axis(logits_SxE, ranked_SxE, 1))[:, : case.top_k]
    assert gaps_SxK.min() > 1e-4, f"{case.name}: two experts tie"
    probs_SxE = np.exp(logits_SxE) / np.exp(logits_SxE).sum(1, keepdims=True)
    gaps = [np.diff(np.sort(probs_SxE[choice_SxE[:, e], e])) for e in range(case.experts)]
    assert np.concatenate(gaps).min() > 1e-6, f"{case.name}: two tokens tie"

    # Only 'position' goes by token alone; for k = 2 first choices precede all second ones.
    first_come_SxE = choice_SxE & (np.cumsum(choice_SxE, axis=0) <= capacity)
    by_token = not case.drops or (case.priority == "position" and case.top_k != 2)
    assert (kept_SxE == first_come_SxE).all() == by_token, f"{case.name}: order of tokens"


def capacities(count: int = 200) -> dict[str, np.ndarray]:
    """DeepSpeed's capacity of random layers, half of them of shares where float32 may round up."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        experts = int(257 ** rng.random())  # from 1 to 256, as many small ones as large ones
        minimum, top_k = rng.integers(17), rng.choice([1, 2, 4])
        if i % 2:
            tokens, factor = int(5001 ** rng.random()), rng.uniform(0.5, 4)
        else:  # share · factor is whole, or would be if the factor were exact
            tokens = experts * 5 * rng.integers(1, 1000 // experts + 1)
            factor = rng.choice([0.6, 1.0, 1.2, 1.25, 1.4, 1.6, 2.0, 2.2, 2.4, 2.8])
        rows.append((tokens, experts, factor, minimum, top_k))
    # Multiplied by k before it becomes float32, as the gates for k = 2 and above do.
    capacity = [
        sharded_moe._capacity(
            torch.empty(int(tokens), int(experts)),
            torch.tensor(float(factor * top_k)),
            torch.tensor(int(minimum)),
        )
        for tokens, experts, factor, minimum, top_k in rows
    ]
    return {
        "columns": np.array(["tokens", "experts", "capacity_factor", "min_capacity", "top_k"]),
        "rows": np.array(rows, np.float64),
        "capacity": np.array(capacity, np.int64),
    }


if __name__ == "__main__":
    main()
