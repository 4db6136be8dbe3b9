"""Muon: matrix by matrix against optax's, two updates against NumPy, and the rule by parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import _muon as reference

from prmoe_jax.nn.parameters import named_leaves
from prmoe_jax.training.optimizer import (
    learning_rate,
    make_optimizer,
    optimizers,
    orthogonalize,
)
from prmoe_jax.training.step import init_state
from tests.support.configs import settings
from tests.support.quick import jit

# Muon's own iteration, and the RMS of Moonlight's updates (section 2.2).
COEFFICIENTS, STEPS, RMS = (3.4445, -4.7750, 2.0315), 5, 0.2
TODAY = {"family": "qwen3_moe", "heads": 4, "kv_heads": 2, "head_dim": 6}
# Where one layer's parameters, without the stacked dimension, are matrices: rows and columns.
MATRICES = {
    "attention.w_qkv": ((0,), (2, 3)),
    "attention.w_q": ((0,), (1, 2)),
    "attention.w_kv": ((0,), (2, 3)),
    "attention.w_out": ((0, 1), (2,)),
    "mlp.w_in": ((0,), (1,)),
    "mlp.w_gate": ((0,), (1,)),
    "mlp.w_out": ((0,), (1,)),
    "experts.w_in": ((1,), (2,)),
    "experts.w_gate": ((1,), (2,)),
    "experts.w_out": ((1,), (2,)),
}


def rows_and_columns(name):
    """From the table above, with the stacked dimension; None for other parameters."""
    for end, axes in MATRICES.items():
        if name.endswith(end):
            return reference.MuonDimensionNumbers(*(tuple(a + 1 for a in of) for of in axes))
    return None


@pytest.mark.parametrize(("text", "model"), [("3 layers, E=3, residual", {}), ("2 layers", TODAY)])
def test_matrices_equal_optax_s(text, model):
    values = settings(text, model=model)
    state = init_state(values)
    given = {
        name: jax.random.normal(jax.random.key(len(name)), leaf.shape)
        for name, leaf in named_leaves(state.model).items()
        if rows_and_columns(name)
    }
    assert len(given) >= 5
    for name, found in jit(orthogonalize)(given).items():
        axes = rows_and_columns(name)
        x = given[name]
        orthogonal = reference.orthogonalize_via_newton_schulz(
            x, jnp.array(COEFFICIENTS), STEPS, dimension_numbers=axes
        )
        expected = reference._scale_update_for_consistent_rms(orthogonal, axes, RMS)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4, err_msg=name)


def test_every_matrix_on_its_own():
    """Queries, keys, values and experts: one that is scaled changes nothing; rows stay in order."""
    given = {"attention.w_qkv": jax.random.normal(jax.random.key(0), (2, 12, 3, 3, 5))}
    given["experts.w_in"] = jax.random.normal(jax.random.key(1), (2, 3, 12, 7))
    found = orthogonalize(given)
    scaled = {name: x.at[1].multiply(50.0) for name, x in given.items()}
    scaled["attention.w_qkv"] = scaled["attention.w_qkv"].at[:, :, 1].multiply(1e-3)
    scaled["experts.w_in"] = scaled["experts.w_in"].at[:, 2].multiply(1e3)
    for name, x in orthogonalize(scaled).items():
        np.testing.assert_allclose(x, found[name], rtol=1e-3, atol=1e-4, err_msg=name)
    for x_MxN in (found["attention.w_qkv"][1, :, 2].reshape(12, 15), found["experts.w_in"][0, 1]):
        s = np.linalg.svd(np.asarray(x_MxN), compute_uv=False) / (RMS * max(x_MxN.shape) ** 0.5)
        assert 0.3 < s.min() and s.max() < 1.3
    # The singular vectors are the gradient's.
    x_MxN, y_MxN = given["experts.w_in"][0, 1], found["experts.w_in"][0, 1]
    both_NxN = np.asarray(x_MxN.T @ y_MxN)
    np.testing.assert_allclose(both_NxN, both_NxN.T, rtol=1e-3, atol=1e-3)


def orthogonal_by_numpy(x_MxN):
    """In float64, with nothing transposed."""
    x = x_MxN / np.linalg.norm(x_MxN)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return 0.2 * np.sqrt(max(x.shape)) * x


def test_two_updates_equal_numpy():
    """Clipped together, momentum, decay and rate; the others have AdamW's."""
    both = {"clip_norm": 0.5, "weight_decay": 0.3, "warmup_tokens": 200}
    values = settings("2 layers, E=2", optimizer=both | {"kind": "muon", "momentum": 0.8})
    adamw = settings("2 layers, E=2", optimizer=both)
    state, other = init_state(values), init_state(adamw)
    update, rate = jit(make_optimizer(values).update), learning_rate(values)
    update_other = jit(make_optimizer(adamw).update)
    name = "stages.0.blocks.1.mlp.experts.w_in"
    w = np.asarray(named_leaves(state.model)[name], np.float64)
    momentum = np.zeros_like(w)
    model, opt, model_other, opt_other = state.model, state.optimizer, other.model, other.optimizer
    rng = np.random.default_rng(0)
    for step in range(2):
        gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), model)
        updates, opt = update(gradient, opt, model)
        model = jax.tree.map(jnp.add, model, updates)
        updates, opt_other = update_other(gradient, opt_other, model_other)
        model_other = jax.tree.map(jnp.add, model_other, updates)
        named = {k: np.asarray(v, np.float64) for k, v in named_leaves(gradient).items()}
        g = named[name] * min(1, 0.5 / np.sqrt(sum((g**2).sum() for g in named.values())))
        momentum = g + 0.8 * momentum
        ahead = g + 0.8 * momentum
        steps = np.stack([[orthogonal_by_numpy(x) for x in layer] for layer in ahead])
        w = w - float(rate(step)) * (steps + 0.3 * w)
    np.testing.assert_allclose(named_leaves(model)[name], w, rtol=1e-4, atol=1e-6)
    chosen, theirs = named_leaves(optimizers(model)), named_leaves(model_other)
    for name, leaf in named_leaves(model).items():
        if chosen[name] == "adamw":
            np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)
        else:
            assert (leaf != theirs[name]).any(), name


@pytest.mark.parametrize(("text", "model"), [("4 layers, E=2, residual", {}), ("2 layers", TODAY)])
def test_what_is_a_matrix(text, model):
    state = init_state(settings(text, model=model, optimizer={"kind": "muon"}))
    for name, optimizer in named_leaves(optimizers(state.model)).items():
        assert (optimizer == "muon") == (rows_and_columns(name) is not None), name
    # Matrices have one moment, the others two.
    sizes = {name: leaf.size for name, leaf in named_leaves(state.model).items()}
    matrices = sum(size for name, size in sizes.items() if rows_and_columns(name))
    held = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert held == matrices + 2 * (sum(sizes.values()) - matrices)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_rate_of_routers(kind):
    """The updates of routers are a quarter, and all others are the same."""

    def updates(rate):
        optimizer = {"kind": kind, "router_rate": rate}
        config = settings("2 layers, E=3", optimizer=optimizer)
        model = init_state(config).model
        chain = make_optimizer(config)
        return named_leaves(chain.update(model, chain.init(model), model)[0])

    whole, slow = updates(1.0), updates(0.25)
    routers = [name for name in whole if name.endswith("w_router")]
    assert len(routers) == 1
    for name, update in whole.items():
        np.testing.assert_array_equal(slow[name], update * (0.25 if name in routers else 1))
        assert np.abs(update).max() > 0 or name not in routers
