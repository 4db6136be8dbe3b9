"""Compares every kernel that this platform can run with plain formulas in float32 on the CPU.

The formulas are written anew here, and use none of the code that they check. Only exchanges are
compared with our own layer on one device.

T: all tokens, or tokens in the KV cache. K: a token's choices, or the width of a head.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prmoe_jax.check.findings import FAIL, OK, WARN, Finding, Part
from prmoe_jax.config.loading import resolve
from prmoe_jax.config.schema import Config, ExecutionConfig, ModelConfig, MoeConfig
from prmoe_jax.errors import describe
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
from prmoe_jax.nn import matmul
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
BOTH = "float32", "bfloat16"

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
    dtypes: tuple[str, ...] = BOTH
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
        if jax.device_count() > 1:
            fix = "check again with one process for all devices of a host"
            findings.append(Finding("exchanges", WARN, line, fix))
        else:
            findings.append(Finding("exchanges", OK, line))
    return Part(findings, errors)


def _judge(name: str, errors: dict[str, dict[str, float]], platform: str) -> Finding:
    texts, wrong = [], False
    for dtype, parts in errors.items():
        limit = TOLERANCES[dtype]
        if dtype == "float32" and platform != "cpu":
            limit = ROUNDED_FLOAT32
        texts.append(
            f"{dtype} " + ", ".join(f"{part} {value:.0e}" for part, value in parts.items())
        )
        texts[-1] += f" of {limit:.0e}"
        wrong |= not all(value <= limit for value in parts.values())  # NaN is wrong
    if wrong:
        return Finding(name, FAIL, f"wrong numbers: {'; '.join(texts)}", _fix(name))
    return Finding(name, OK, "; ".join(texts))


def _fix(name: str) -> str:
    what = {
        "dispatch": "use another execution.dispatch",
        "exchange": "use another execution.exchange or mesh",
        "attention": "use another execution.attention",
    }.get(name.split()[0], "run nothing here")
    return f"{what}; report it with the versions above, and try others of jax and of the driver"


def compare(case: Case, device: jax.Device, cpu: jax.Device) -> dict[str, dict[str, float]]:
    """The largest errors of a kernel, each as a share of the oracle's largest absolute value.

    Args:
      case: the kernel.
      device: where it runs, unless the case has a mesh.
      cpu: where the oracle runs, on the same arguments, rounded to the dtype.

    Returns:
      dtype -> `forward`, the error of the result, and `backward`, the largest error of the
      gradients, if the case has them.
    """
    shape = jax.eval_shape(case.oracle, *case.arguments).shape
    target = _normal(5, *shape)
    expect = _quick(partial(_outputs, case.oracle, case.gradients))
    return {dtype: _errors(case, dtype, target, expect, device, cpu) for dtype in case.dtypes}


def _errors(case: Case, dtype: str, target, expect, device, cpu) -> dict[str, float]:
    rounded = jax.tree.map(
        lambda x: np.asarray(x).astype(jnp.dtype(dtype)).astype(np.float32), case.arguments
    )
    expected = expect(*jax.device_put((rounded, target), cpu))
    ours = jax.jit(partial(_outputs, partial(case.ours, jnp.dtype(dtype)), case.gradients))
    if case.mesh is None:
        got = ours(*jax.device_put((rounded, target), device))
    else:
        with jax.set_mesh(case.mesh):
            rows = NamedSharding(case.mesh, PartitionSpec(batch_axes(case.mesh)))
            got = ours(jax.device_put(rounded, case.shardings), jax.device_put(target, rows))
    found = {"forward": _error(got[0], expected[0])}
    if case.gradients:
        pairs = zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True)
        # np.max keeps a NaN; max() may lose it.
        found["backward"] = float(np.max([_error(a, b) for a, b in pairs]))
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
    platform = devices[0].platform
    yield from _dispatches()
    yield _unrolled()
    for name in ATTENTION.get(platform, ("xla",)):
        yield from _attention(name)
    yield _cached_attention()
    yield from _products()
    yield _cross_entropy()
    if len(devices) > 1:
        yield from _exchanges(devices[: 1 << (len(devices).bit_length() - 1)])


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _gelu(x):
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _all_experts(experts: Experts, x_TxD) -> jax.Array:
    """Every expert on every token, [E, T, D]."""
    w_in, b_in, w_out, b_out = (
        p[...] for p in (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
    )
    h_ExTxF = _gelu(jnp.einsum("TD,EDF->ETF", x_TxD, w_in) + b_in[:, None])
    return jnp.einsum("ETF,EFD->ETD", h_ExTxF, w_out) + b_out[:, None]


def _experts(count: int, width: int, hidden: int) -> Experts:
    shape = MLPShape(width, hidden, 0.5, 0.5)
    experts = _quick(lambda: Experts(count, shape, jax.random.key(0)))()
    experts.b_in[...], experts.b_out[...] = _normal(2, count, hidden), _normal(3, count, width)
    return experts


def _dispatches() -> Iterator[Case]:
    groups, tokens, width, hidden, count, top_k = 3, 23, 7, 11, 5, 2
    experts = _experts(count, width, hidden)
    valid_GxS = np.broadcast_to(np.arange(tokens) < 19, (groups, tokens))
    x_GxSxD = _normal(0, groups, tokens, width)
    scores_GxSxE = _normal(1, groups, tokens, count)
    for name, slots in {**dict.fromkeys(dispatch.BACKENDS, 7), "per_token": tokens}.items():
        rules = {"moe": MoeConfig(), "top_k": top_k, "slots": slots}
        routing, _ = _quick(partial(route, **rules))(scores_GxSxE, valid_GxS)
        routing = jax.tree.map(np.asarray, routing)
        kept_GxSxK = routing.kept_GxSxK.astype(np.float32)

        def ours(dtype, x_GxSxD, weight_GxSxK, experts, name=name, routing=routing, slots=slots):
            weighed = routing._replace(weight_GxSxK=weight_GxSxK * routing.kept_GxSxK)
            given = x_GxSxD.astype(dtype), weighed, Local(experts)
            if name == "per_token":
                return dispatch.few_through_experts(*given)
            return dispatch.through_experts(name, *given, slots)[0]

        def oracle(x_GxSxD, weight_GxSxK, experts, kept_GxSxK=kept_GxSxK, routing=routing):
            y_ExTxD = _all_experts(experts, x_GxSxD.reshape(-1, width))
            chosen_TxKxE = jax.nn.one_hot(routing.expert_GxSxK.reshape(-1, top_k), count)
            weight_TxK = (weight_GxSxK * kept_GxSxK).reshape(-1, top_k)
            y_TxD = jnp.einsum("TKE,TK,ETD->TD", chosen_TxKxE, weight_TxK, y_ExTxD)
            return y_TxD.reshape(x_GxSxD.shape)

        arguments = x_GxSxD, routing.weight_GxSxK, experts
        yield Case(f"dispatch {name}", ours, oracle, arguments)


def _unrolled() -> Case:
    """`kernels.unrolled`: each expert has its own matrix products, as after an exchange."""

    def oracle(x_XxExRxD, experts):
        every = jnp.stack([_all_experts(experts, x.reshape(-1, 7)) for x in x_XxExRxD])
        own = [every[:, e].reshape(2, 5, 3, 7)[:, e] for e in range(5)]
        return jnp.stack(own, 1)

    arguments = _normal(0, 2, 5, 3, 7), _experts(5, 7, 11)
    return Case(
        "experts unrolled",
        lambda dtype, x, experts: kernels.unrolled(experts.weights(dtype), x.astype(dtype)),
        oracle,
        arguments,
    )


def _softmax_attention(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL) -> jax.Array:
    length = segments_BxL.shape[1]
    scores_BxHxLxL = jnp.einsum("BQHK,BTHK->BHQT", q_BxLxHxK, k_BxLxHxK)
    same_BxLxL = segments_BxL[:, :, None] == segments_BxL[:, None]
    seen_BxLxL = same_BxLxL & np.tri(length, dtype=bool)
    weights = jnp.where(
        seen_BxLxL[:, None], jnp.exp(scores_BxHxLxL / math.sqrt(q_BxLxHxK.shape[-1])), 0
    )
    weights /= weights.sum(-1, keepdims=True)
    return jnp.einsum("BHQT,BTHK->BQHK", weights, v_BxLxHxK)


def _attention(name: str) -> Iterator[Case]:
    """Two sequences of several documents; the second one ends with padding."""
    batch, length, heads, width = 2, 131, 3, 64
    segments_BxL = np.sort(np.random.default_rng(4).integers(1, 4, (batch, length)), 1)
    segments_BxL[1, 113:] = 0

    def ours(dtype, q, k, v):
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        return attend(q, k, v, segments_BxL, name)

    arguments = tuple(_normal(seed, batch, length, heads, width) for seed in range(3))
    oracle = partial(_softmax_attention, segments_BxL=segments_BxL)
    dtypes = ("bfloat16",) if name == "cudnn" else BOTH
    if name != "cudnn" or not cudnn_refusal(_CUDNN):
        yield Case(f"attention {name}", ours, oracle, arguments, dtypes=dtypes)


def _cached_attention() -> Case:
    """The last 5 of 23 tokens attend to a KV cache of all 23."""
    batch, length, heads, width = 2, 23, 3, 16
    position_BxQ = np.broadcast_to(np.arange(length - 5, length), (batch, 5))

    def ours(dtype, q, k, v):
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        cache = KVCache(k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))
        return attend_to_cache(q[:, -5:], cache, position_BxQ)

    def oracle(q, k, v):
        return _softmax_attention(q, k, v, np.ones((batch, length), np.int32))[:, -5:]

    arguments = tuple(_normal(seed, batch, length, heads, width) for seed in range(3))
    return Case("attention with KV cache", ours, oracle, arguments, gradients=False)


def _products() -> Iterator[Case]:
    for rows in (37, 3):  # CPUs have another kernel for few rows
        arguments = _normal(0, rows, 29), _normal(1, 29, 31)
        few = ", few rows" if rows == 3 else ""

        def ours(dtype, x, w):
            return matmul.matmul(x.astype(dtype), w.astype(dtype))

        yield Case(f"product{few}", ours, jnp.matmul, arguments)

        def int8(dtype, x, w):
            return matmul.matmul(x.astype(dtype), quantize(w, "int8", (-2,)))

        def dequantized(x, w):
            scale = jnp.abs(w).max(0) / 127
            return x @ (jnp.round(w / scale) * scale)

        yield Case(f"product of int8{few}", int8, dequantized, arguments, gradients=False)


class _Table(NamedTuple):
    """Stands in for a model; the loss needs only its map to logits."""

    table_VxD: jax.Array

    def unembedding(self, dtype) -> Unembedding:
        return Unembedding(self.table_VxD.astype(dtype))


def _cross_entropy() -> Case:
    """The loss in chunks of tokens; it computes its gradients in the forward pass."""
    rows, length, width, vocabulary = 3, 2 * chunks.CHUNK + 3, 7, 61
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, vocabulary, (2, rows, length)).astype(np.int32)
    mask = rng.random((rows, length)) < 0.8

    def ours(dtype, x_BxLxD, table_VxD):
        batch = Batch(tokens, targets, mask, np.ones_like(tokens))
        return cross_entropy(0.1)(_Table(table_VxD), x_BxLxD.astype(dtype), batch)["loss"]

    def oracle(x_BxLxD, table_VxD):
        logits_BxLxV = x_BxLxD @ table_VxD.T
        log_z_BxL = jnp.log(jnp.exp(logits_BxLxV).sum(-1))
        right_BxL = (logits_BxLxV * jax.nn.one_hot(targets, vocabulary)).sum(-1)
        return ((log_z_BxL - right_BxL + 0.1 * log_z_BxL**2) * mask).sum()

    arguments = _normal(0, rows, length, width), _normal(1, vocabulary, width)
    return Case("cross-entropy in chunks", ours, oracle, arguments)


def _exchanges(devices: list) -> Iterator[Case]:
    """A MoE layer on several devices, with each exchange that their number allows."""
    count = len(devices)
    half = count // 2
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
    found: list[tuple] = [(name, name, {"min_capacity": 3}, few) for name in meshes]
    found += [
        (f"{name}, nothing dropped", name, dropless, many) for name in ("flat", "coordinated")
    ]
    found.append(("flat, few tokens, nothing dropped", "flat", dropless, few))
    for title, name, rules, length in found:
        config = _layer_config(*meshes[name], rules, length, count)
        execution = ExecutionConfig(exchange=name.partition(",")[0])
        yield _exchange(title, dataclasses.replace(config, execution=execution), devices)


def _layer_config(
    sizes: dict[str, int], experts: int, rules: dict, length: int, devices: int
) -> Config:
    model: dict = {"layers": 1, "placement": "every 1", "experts": (experts,), "dtype": "float32"}
    model |= {"d_model": 14, "d_ff": 22, "heads": 2, "length": length, "vocab_size": 384}
    model |= {"init_std": 0.5}
    return resolve(
        {
            "model": model,
            "moe": rules,
            "mesh": sizes,
            "data": {"tokenizer": "bytes"},
            "train": {"steps": 1, "batch_size": devices // sizes.get("tensor", 1)},
        }
    )


def _exchange(name: str, config: Config, devices: list) -> Case:
    mesh, model = make_mesh(config, devices), config.model
    (count,) = {e for e in model.schedule.experts if e}
    layer = _quick(lambda: MoE(count, model, config.moe, jax.random.key(0)))()
    x_BxLxD = _normal(0, config.train.batch_size, model.length, model.d_model)
    valid_BxL = np.ones(x_BxLxD.shape[:2], bool)

    def ours(dtype, tree, x_BxLxD):
        layer = tree["mlp"]
        return layer(x_BxLxD.astype(dtype), valid_BxL, execution=config.execution)[0]

    def oracle(tree, x_BxLxD):
        return tree["mlp"](x_BxLxD, valid_BxL, execution=ExecutionConfig(dispatch="einsum"))[0]

    rows = NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))
    tree = {"mlp": layer}
    return Case(
        f"exchange {name}",
        ours,
        oracle,
        (tree, x_BxLxD),
        mesh=mesh,
        shardings=(sharding.shardings(tree, mesh), rows),
    )
