"""The feed-forward network: two layers of weights, or three with a gate."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from prmoe_jax.config.schema import ModelConfig
from prmoe_jax.nn import remat
from prmoe_jax.nn.matmul import matmul

# The clamped SwiGLU of gpt-oss: the largest input, and the slope of the gate's sigmoid.
LIMIT, SLOPE = 7.0, 1.702


def gelu(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation, as in GPT-2."""
    return jax.nn.gelu(x, approximate=True)


class MLPShape(NamedTuple):
    """The shape of an MLP, and the standard deviations of its initial weights."""

    d_model: int
    d_ff: int
    std: float = 0.02  # of w_in and w_gate
    std_out: float = 0.02
    gated: bool = False
    biases: bool = True
    gate_bias: bool = False
    clamped: bool = False  # whether `activate` has its clamped form

    @classmethod
    def of(cls, model: ModelConfig, d_ff: int) -> "MLPShape":
        """The shape of a model's MLP or expert with this many hidden units."""
        gated, every = model.gated, model.biases == "every"
        return cls(
            model.d_model,
            d_ff,
            model.init_std,
            model.output_std,
            gated=gated,
            biases=every or model.biases == "all",
            gate_bias=every and gated,
            clamped=model.activation == "clamped_swiglu",
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLPWeights:
    """The weights of an MLP, or of E experts with a leading axis E."""

    w_in_DxF: jax.Array
    w_out_FxD: jax.Array
    b_in_F: jax.Array | None = None
    b_out_D: jax.Array | None = None
    w_gate_DxF: jax.Array | None = None
    b_gate_F: jax.Array | None = None
    clamped: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
    """Hidden units before their activation, and whether that is clamped."""

    x_F: jax.Array
    gate_F: jax.Array | None = None
    clamped: bool = dataclasses.field(default=False, metadata={"static": True})


def activate(hidden: Hidden) -> jax.Array:
    """silu(gate) · x, or gelu(x) without a gate.

    The clamped form, of gpt-oss, is g · σ(1.702 g) · (u + 1), where g is the gate, at most 7, and u
    is x between -7 and 7.
    """
    x_F, gate_F = hidden.x_F, hidden.gate_F
    if gate_F is None:
        return gelu(x_F)
    if hidden.clamped:
        gate_F = jnp.minimum(gate_F, LIMIT)
        return gate_F * jax.nn.sigmoid(SLOPE * gate_F) * (jnp.clip(x_F, -LIMIT, LIMIT) + 1)
    return jax.nn.silu(gate_F) * x_F


def add_bias(x: jax.Array, bias: jax.Array | nnx.Param | None) -> jax.Array:
    """Adds a bias, if there is one, in x's dtype."""
    return x if bias is None else x + broadcast(bias[...], x)


def broadcast(part: jax.Array, x: jax.Array) -> jax.Array:
    """`part` in x's shape and dtype, with a gradient that is summed in float32.

    With JAX's implicit broadcast, the gradient is summed in x's dtype. In bfloat16, a sum of ones
    stops growing at 256, or at a few thousand if XLA sums in parts.
    """
    return jnp.broadcast_to(part.astype(jnp.float32), x.shape).astype(x.dtype)


class MLP(nnx.Module):
    """W_out · h + b_out, where h activates W_in x + b_in and, if there is one, the gate.

    The gate is W_gate x + b_gate; `activate` has the formulas.
    """

    def __init__(self, w_in, b_in, w_out, b_out, w_gate=None, b_gate=None, clamped=False):
        self.w_in, self.b_in = nnx.Param(w_in), _parameter(b_in)
        self.w_out, self.b_out = nnx.Param(w_out), _parameter(b_out)
        self.w_gate, self.b_gate = _parameter(w_gate), _parameter(b_gate)
        self.clamped = clamped

    @classmethod
    def drawn(cls, shape: MLPShape, key: jax.Array) -> "MLP":
        """Draws w_in and the gate from N(0, std²) and w_out from N(0, std_out²); biases are 0."""
        d_model, d_ff, std, std_out, gated, biases, gate_bias, clamped = shape
        key_in, key_out = jax.random.split(key)
        w_in = std * jax.random.normal(key_in, (d_model, d_ff))
        w_out = std_out * jax.random.normal(key_out, (d_ff, d_model))
        b_in, b_out = (jnp.zeros(d_ff), jnp.zeros(d_model)) if biases else (None, None)
        w_gate = None
        if gated:
            w_gate = std * jax.random.normal(jax.random.fold_in(key_in, 1), w_in.shape)
        b_gate = jnp.zeros(d_ff) if gate_bias else None
        return cls(w_in, b_in, w_out, b_out, w_gate, b_gate, clamped)

    def __call__(self, x_D: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D] in x's dtype."""
        x_F, gate_F = add_bias(matmul(x_D, self.w_in[...]), self.b_in), None
        if self.w_gate is not None:
            gate_F = add_bias(matmul(x_D, self.w_gate[...]), self.b_gate)
            gate_F = remat.save_matmul(gate_F)
        h_F = activate(Hidden(remat.save_matmul(x_F), gate_F, self.clamped))
        return add_bias(matmul(h_F, self.w_out[...]), self.b_out)


def _parameter(x: jax.Array | None) -> nnx.Param | None:
    return None if x is None else nnx.Param(x)
