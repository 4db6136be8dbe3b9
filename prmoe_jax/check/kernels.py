"""Compares every kernel that this platform can run with plain formulas in float32 on the CPU.

The formulas are written anew here, and use none of the code that they check. Only exchanges are
compared with our own layer on one device.

T: all tokens, or tokens in the KV cache. K: a token's choices, or the width of a head.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prmoe_jax.check.findings import FAIL, OK, WARN, Finding, Part
from prmoe_jax.config.loading import resolve
from prmoe_jax.config.schema import ExecutionConfig, ModelConfig, MoeConfig
from prmoe_jax.errors.ending import describe
from prmoe_jax.model import chunks
from prmoe_jax.model.attention import KVCache, attend_to_cache
from prmoe_jax.model.attention_kernels import attend, cudnn_refusal
from prmoe_jax.model.batch import Batch
from prmoe_jax.model.loss import cross_entropy
from prmoe_jax.model.transformer import Unembedding
from prmoe_jax.moe import dispatch, exchange, kernels
from prmoe_jax.moe.experts import Experts, Local
from prmoe_jax.moe.layer import MoE
from prmoe_jax.moe.routing import route
from prmoe_jax.nn.matmul import matmul
from prmoe_jax.nn.mlp import MLPShape
from prmoe_jax.nn.quantized import quantize
from prmoe_jax.parallel import sharding
from prmoe_jax.parallel.axes import batch_axes
from prmoe_jax.parallel.mesh import make_mesh

log = logging.getLogger(__name__)

# The largest error allowed, as a share of the oracle's largest absolute value. Accelerators may
# round the factors of a float32 product to fewer bits, and have `ROUNDED_FLOAT32` instead.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
ROUNDED_FLOAT32 = 1e-2

# For functions that run once on the CPU: without optimisations they compile much faster.
_quick = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)

_CUDNN = ModelConfig(length=132, d_model=192, heads=3, dtype="bfloat16")  # `_attention`'s, padded
# Attention kernels by platform.
ATTENTION = {"cpu": ("xla", "blocks"), "gpu": ("xla", "cudnn"), "tpu": ("xla", "splash")}


class Case(NamedTuple):
    """A kernel, and the formula (oracle) with which it is compared."""

    name: str
    ours: Callable[..., jax.Array]  # called with the compute dtype and the arguments
    oracle: Callable[..., jax.Array]  # called with the arguments
    arguments: tuple  # pytrees of float32 arrays
    gradients: bool = True
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    mesh: Mesh | None = None  # the devices over which `shardings` spread the arguments
    shardings: Any = None


def check() -> Part:
    """Runs each kernel, and its gradient if it has one, on this process's first device.

    Exchanges run on all devices of this process, or on the largest power of two of them.
    """
    devices = jax.local_devices()
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        line = f"there is no CPU device to compare with {devices[0].platform}"
        return Part([Finding("kernels", FAIL, line, "add cpu to JAX_PLATFORMS, or unset it")], {})
    findings, errors = [], {}
    with jax.default_device(cpu):
        found = list(cases(devices))
    for case in found:
        log.info("kernel: %s", case.name)
        try:
            errors[case.name] = compare(case, devices[0], cpu)
        except Exception as error:  # a kernel that cannot run here may raise anything
            line = f"cannot run: {describe(error).line}"
            findings.append(Finding(case.name, FAIL, line, _fix(case.name)))
            continue
        findings.append(_judge(case.name, errors[case.name], devices[0].platform))
    if devices[0].platform == "gpu" and (refusal := cudnn_refusal(_CUDNN)):
        line = f"cannot run in bfloat16: {refusal}"
        findings.append(Finding("attention cudnn", WARN, line, "use execution.attention=xla"))
    if len(devices) == 1:
        line = "not run: they need several devices of a process, and there is one"
        fix = "check again with one process for all devices of a host"
        several = jax.device_count() > 1
        findings.append(Finding("exchanges", *((WARN, line, fix) if several else (OK, line))))
    return Part(findings, errors)


def _judge(name: str, errors: dict[str, dict[str, float]], platform: str) -> Finding:
    limits = TOLERANCES if platform == "cpu" else TOLERANCES | {"float32": ROUNDED_FLOAT32}
    texts, right = [], True
    for dtype, parts in errors.items():
        shown = ", ".join(f"{part} {value:.0e}" for part, value in parts.items())
        texts.append(f"{dtype} {shown} of {limits[dtype]:.0e}")
        right &= all(value <= limits[dtype] for value in parts.values())  # NaN is wrong
    line = "; ".join(texts)
    if right:
        return Finding(name, OK, line)
    return Finding(name, FAIL, f"wrong numbers: {line}", _fix(name))


def _fix(name: str) -> str:
    what = {
        "dispatch": "use another execution.dispatch",
        "exchange": "use another execution.exchange or mesh",
        "attention": "use another execution.attention",
    }.get(name.split()[0], "run nothing here")
    return f"{what}; report it with the versions above, and try others of jax and of the driver"


def compare(case: Case, device: jax.Device, cpu: jax.Device) -> dict[str, dict[str, float]]:
    """The largest errors of a kernel, each as a share of the oracle's largest absolute value.

    The kernel runs on `device` or the case's mesh, the oracle on `cpu`, with the same arguments,
    rounded to the dtype.

    Returns:
      dtype -> `forward`, the error of the result, and `backward`, the largest error of the
      gradients, if the case has them.
    """
    target = _normal(5, *jax.eval_shape(case.oracle, *case.arguments).shape)
    expect = _quick(partial(_outputs, case.oracle, case.gradients))
    on_mesh = jax.set_mesh if case.mesh else contextlib.nullcontext
    found = {}
    for dtype in map(jnp.dtype, case.dtypes):
        rounded = jax.tree.map(
            lambda x, dtype=dtype: np.asarray(x, dtype).astype(np.float32), case.arguments
        )
        expected = expect(*jax.device_put((rounded, target), cpu))
        ours = jax.jit(partial(_outputs, partial(case.ours, dtype), case.gradients))
        with on_mesh(case.mesh):
            got = ours(jax.device_put(rounded, case.shardings or device), target)
        forward, *backward = jax.tree.leaves(jax.tree.map(_error, got, expected))
        found[dtype.name] = {"forward": forward}
        if backward:
            found[dtype.name]["backward"] = float(np.max(backward))  # max() may lose a NaN
    return found


def _outputs(function, gradients: bool, arguments, target):
    """The result, and the gradients of all arguments if the result's gradient is `target`."""

    def loss(arguments):
        y = function(*arguments).astype(jnp.float32)
        return (y * target).sum(), y

    if not gradients:
        return loss(arguments)[1], ()
    gradient, y = jax.grad(loss, has_aux=True)(arguments)
    return y, gradient


def _error(got, expected) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(got - expected).max() / (np.abs(expected).max() or 1.0))


def cases(devices: list) -> Iterator[Case]:
    """The kernels that these devices can run, mostly at prime sizes, which no block divides."""
    experts = _quick(lambda: Experts(5, MLPShape(7, 11, 0.5, 0.5), jax.random.key(0)))()
    experts.b_in[...], experts.b_out[...] = _normal(2, 5, 11), _normal(3, 5, 7)
    for name in dispatch.BACKENDS:
        yield _dispatch(name, 7, experts)
    yield _dispatch("per_token", 23, experts)
    yield _unrolled(experts)
    for name in ATTENTION.get(devices[0].platform, ("xla",)):
        if name != "cudnn":
            yield _attention(name)
        elif not cudnn_refusal(_CUDNN):
            yield _attention(name)._replace(dtypes=("bfloat16",))
    yield _cached_attention()
    yield from _products()
    yield _cross_entropy()
    if len(devices) > 1:
        yield from _exchanges(devices[: 1 << (len(devices).bit_length() - 1)])


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _all_experts(experts: Experts, x_TxD) -> jax.Array:
    """Every expert on every token, [E, T, D]."""
    weights = experts.weights(jnp.float32)
    x = jnp.einsum("TD,EDF->ETF", x_TxD, weights.w_in_DxF) + weights.b_in_F[:, None]
    h_ExTxF = 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # GELU
    return jnp.einsum("ETF,EFD->ETD", h_ExTxF, weights.w_out_FxD) + weights.b_out_D[:, None]


def _dispatch(name: str, slots: int, experts: Experts) -> Case:
    groups, tokens, width, top_k = 3, 23, 7, 2
    valid_GxS = np.broadcast_to(np.arange(tokens) < 19, (groups, tokens))
    scores_GxSxE = _normal(1, groups, tokens, experts.count)
    rules = {"moe": MoeConfig(), "top_k": top_k, "slots": slots}
    routing, _ = _quick(partial(route, **rules))(scores_GxSxE, valid_GxS)
    routing = jax.tree.map(np.asarray, routing)

    def ours(dtype, x_GxSxD, weight_GxSxK, experts):
        weighed = routing._replace(weight_GxSxK=weight_GxSxK * routing.kept_GxSxK)
        given = x_GxSxD.astype(dtype), weighed, Local(experts)
        if name == "per_token":
            return dispatch.few_through_experts(*given)
        return dispatch.through_experts(name, *given, slots)[0]

    def oracle(x_GxSxD, weight_GxSxK, experts):
        y_ExTxD = _all_experts(experts, x_GxSxD.reshape(-1, width))
        chosen_TxKxE = jax.nn.one_hot(routing.expert_GxSxK.reshape(-1, top_k), experts.count)
        weight_TxK = (weight_GxSxK * routing.kept_GxSxK).reshape(-1, top_k)
        y_TxD = jnp.einsum("TKE,TK,ETD->TD", chosen_TxKxE, weight_TxK, y_ExTxD)
        return y_TxD.reshape(x_GxSxD.shape)

    arguments = _normal(0, groups, tokens, width), routing.weight_GxSxK, experts
    return Case(f"dispatch {name}", ours, oracle, arguments)


def _unrolled(experts: Experts) -> Case:
    """`kernels.unrolled`: each expert has its own matrix products, as after an exchange."""

    def ours(dtype, x_XxExRxD, experts):
        return kernels.unrolled(experts.weights(dtype), x_XxExRxD.astype(dtype))

    def oracle(x_XxExRxD, experts):
        y_ExXxExRxD = _all_experts(experts, x_XxExRxD.reshape(-1, 7)).reshape(5, *x_XxExRxD.shape)
        return jnp.einsum("EXERD->XERD", y_ExXxExRxD)  # each expert's own rows

    return Case("experts unrolled", ours, oracle, (_normal(0, 2, 5, 3, 7), experts))


def _softmax_attention(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL) -> jax.Array:
    scores_BxHxLxL = jnp.einsum("BQHK,BTHK->BHQT", q_BxLxHxK, k_BxLxHxK)
    same_BxLxL = segments_BxL[:, :, None] == segments_BxL[:, None]
    seen_BxLxL = same_BxLxL & np.tri(segments_BxL.shape[1], dtype=bool)
    scores_BxHxLxL /= math.sqrt(q_BxLxHxK.shape[-1])
    weights_BxHxLxL = jnp.where(seen_BxLxL[:, None], jnp.exp(scores_BxHxLxL), 0)
    weights_BxHxLxL /= weights_BxHxLxL.sum(-1, keepdims=True)
    return jnp.einsum("BHQT,BTHK->BQHK", weights_BxHxLxL, v_BxLxHxK)


def _attention(name: str) -> Case:
    """Two sequences of several documents; the second one ends with padding."""
    batch, length, heads, width = 2, 131, 3, 64
    segments_BxL = np.sort(np.random.default_rng(4).integers(1, 4, (batch, length)), 1)
    segments_BxL[1, 113:] = 0

    def ours(dtype, *qkv):
        q, k, v = (x.astype(dtype) for x in qkv)
        return attend(q, k, v, segments_BxL, name)

    arguments = tuple(_normal(seed, batch, length, heads, width) for seed in range(3))
    oracle = partial(_softmax_attention, segments_BxL=segments_BxL)
    return Case(f"attention {name}", ours, oracle, arguments)


def _cached_attention() -> Case:
    """The last 5 of 23 tokens attend to a KV cache of all 23."""
    batch, length, heads, width = 2, 23, 3, 16
    position_BxQ = np.broadcast_to(np.arange(length - 5, length), (batch, 5))

    def ours(dtype, *qkv):
        q, k, v = (x.astype(dtype) for x in qkv)
        cache = KVCache(k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))
        return attend_to_cache(q[:, -5:], cache, position_BxQ)

    def oracle(q, k, v):
        return _softmax_attention(q, k, v, np.ones((batch, length), np.int32))[:, -5:]

    arguments = tuple(_normal(seed, batch, length, heads, width) for seed in range(3))
    return Case("attention with KV cache", ours, oracle, arguments, gradients=False)


def _products() -> Iterator[Case]:
    def plain(dtype, x, w):
        return matmul(x.astype(dtype), w.astype(dtype))

    def int8(dtype, x, w):
        return matmul(x.astype(dtype), quantize(w, "int8", (-2,)))

    def dequantized(x, w):
        scale = jnp.abs(w).max(0) / 127
        return x @ (jnp.round(w / scale) * scale)

    for rows, few in {37: "", 3: ", few rows"}.items():  # CPUs have another kernel for few rows
        arguments = _normal(0, rows, 29), _normal(1, 29, 31)
        yield Case(f"product{few}", plain, jnp.matmul, arguments)
        yield Case(f"product of int8{few}", int8, dequantized, arguments, gradients=False)


def _cross_entropy() -> Case:
    """The loss in chunks of tokens; it computes its gradients in the forward pass."""
    rows, length, width, vocabulary = 3, 2 * chunks.CHUNK + 3, 7, 61
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, vocabulary, (2, rows, length)).astype(np.int32)
    mask = rng.random((rows, length)) < 0.8

    def ours(dtype, x_BxLxD, table_VxD):
        batch = Batch(tokens, targets, mask, np.ones_like(tokens))
        unembedding = Unembedding(table_VxD.astype(dtype))
        model = SimpleNamespace(unembedding=lambda _: unembedding)  # the loss needs no more of it
        return cross_entropy(0.1)(model, x_BxLxD.astype(dtype), batch)["loss"]

    def oracle(x_BxLxD, table_VxD):
        logits_BxLxV = x_BxLxD @ table_VxD.T
        log_z_BxL = jnp.log(jnp.exp(logits_BxLxV).sum(-1))
        right_BxL = (logits_BxLxV * jax.nn.one_hot(targets, vocabulary)).sum(-1)
        return ((log_z_BxL - right_BxL + 0.1 * log_z_BxL**2) * mask).sum()

    arguments = _normal(0, rows, length, width), _normal(1, vocabulary, width)
    return Case("cross-entropy in chunks", ours, oracle, arguments)


def _exchanges(devices: list) -> Iterator[Case]:
    """A MoE layer on several devices, with each exchange that their number allows."""
    count, half = len(devices), len(devices) // 2
    # Mesh sizes and number of experts. One expert per device (`flat`) runs `kernels.unrolled`.
    meshes = {
        "flat": ({"expert": count}, count),
        "flat, sliced": ({"expert": half, "expert_slice": 2}, 5 * count),
        "coordinated": ({"expert": half, "tensor": 2}, 5 * count),
    }
    if count >= 4:
        meshes["hierarchical"] = {"expert": count, "expert_inner": half}, 5 * count
    dropless: dict = {"eval_capacity_factor": math.inf}
    few, many = 13, exchange.FEW_TOKENS + 3  # tokens of a sequence; many need `moe/rounds.py`
    for name, placed in meshes.items():
        yield _exchange(name, *placed, {"min_capacity": 3}, few, devices)
    for name in "flat", "coordinated":
        yield _exchange(f"{name}, nothing dropped", *meshes[name], dropless, many, devices)
    yield _exchange("flat, few tokens, nothing dropped", *meshes["flat"], dropless, few, devices)


def _exchange(
    name: str, sizes: dict[str, int], experts: int, rules: dict, length: int, devices: list
) -> Case:
    model: dict = {"layers": 1, "placement": "every 1", "experts": (experts,), "dtype": "float32"}
    model |= {"d_model": 14, "d_ff": 22, "heads": 2, "length": length, "vocab_size": 384}
    config = resolve(
        {
            "model": model | {"init_std": 0.5},
            "moe": rules,
            "execution": {"exchange": name.partition(",")[0]},
            "mesh": sizes,
            "data": {"tokenizer": "bytes"},
            "train": {"steps": 1, "batch_size": len(devices) // sizes.get("tensor", 1)},
        }
    )
    mesh = make_mesh(config, devices)
    layer = _quick(lambda: MoE(experts, config.model, config.moe, jax.random.key(0)))()
    x_BxLxD = _normal(0, config.train.batch_size, length, config.model.d_model)
    valid_BxL = np.ones(x_BxLxD.shape[:2], bool)

    def ours(dtype, tree, x_BxLxD):
        return tree["mlp"](x_BxLxD.astype(dtype), valid_BxL, execution=config.execution)[0]

    def oracle(tree, x_BxLxD):
        return tree["mlp"](x_BxLxD, valid_BxL, execution=ExecutionConfig(dispatch="einsum"))[0]

    tree = {"mlp": layer}
    rows = NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))
    return Case(
        f"exchange {name}",
        ours,
        oracle,
        (tree, x_BxLxD),
        mesh=mesh,
        shardings=(sharding.shardings(tree, mesh), rows),
    )
