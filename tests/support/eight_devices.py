"""What test_parallel.py runs on eight devices, by `python -m tests.support.eight_devices`."""

import dataclasses
import functools
import json
import math
import os
import re
import sys
import traceback
from pathlib import Path
from unittest import mock

import jax

jax.config.update("jax_num_cpu_devices", 8)
# Much is compiled here, and little run.
jax.config.update("jax_disable_most_optimizations", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from prmoe_jax.check import kernels  # noqa: E402
from prmoe_jax.cli import main  # noqa: E402
from prmoe_jax.config import architecture  # noqa: E402
from prmoe_jax.config.loading import resolve, save  # noqa: E402
from prmoe_jax.config.schema import Config, DataConfig, MeshConfig  # noqa: E402
from prmoe_jax.data.pipeline import load_data  # noqa: E402
from prmoe_jax.inference.decoder import decoder  # noqa: E402
from prmoe_jax.inference.generate import PREFILL_CHUNK, Generator, Sampling, prefill  # noqa: E402
from prmoe_jax.model import chunks  # noqa: E402
from prmoe_jax.model.batch import Batch  # noqa: E402
from prmoe_jax.model.loss import forward, token_losses, totals, training_loss  # noqa: E402
from prmoe_jax.model.transformer import init_model  # noqa: E402
from prmoe_jax.moe import exchange, rounds  # noqa: E402
from prmoe_jax.moe.layer import MoE  # noqa: E402
from prmoe_jax.nn.parameters import named_leaves  # noqa: E402
from prmoe_jax.parallel import sharding  # noqa: E402
from prmoe_jax.parallel.axes import replicated, split_batch  # noqa: E402
from prmoe_jax.parallel.mesh import make_mesh  # noqa: E402
from prmoe_jax.plan.collectives import groups  # noqa: E402
from prmoe_jax.plan.program import COLLECTIVES  # noqa: E402
from prmoe_jax.run.checkpoint import Checkpoints  # noqa: E402
from prmoe_jax.run.metrics import to_python  # noqa: E402
from prmoe_jax.run.restore import restore_run  # noqa: E402
from prmoe_jax.tasks.score import Scorer  # noqa: E402
from prmoe_jax.training import evaluate  # noqa: E402
from prmoe_jax.training.step import compile_train_step, init_state, make_train_step, sharded_state  # noqa: E402
from tests.support import batches  # noqa: E402
from tests.support.tokenizers import byte_tokenizer  # noqa: E402

ROWS, LENGTH = 8, 16
ARCHITECTURES = {
    "moe": ("2 layers, every 1, E=4", {}),
    "bfloat16 products": ("4 layers, E=4+8, residual", {}),
    "pyramid, top 2": ("2 layers, every 1, E=4+8, top 2, residual", {}),
    "accumulate": ("4 layers, E=4+8, residual", {"batch_size": 4 * ROWS, "accumulate": 4}),
    "dropless": ("2 layers, every 1, E=4+8, top 2, residual", {}),
    "dropless, top 4": ("2 layers, E=8, top 4", {"batch_size": 2 * ROWS, "accumulate": 2}),
    "one expert": ("2 layers, E=4", {}),
    "equal pieces": ("2 layers, E=16, top 2", {}),
    "muon": ("4 layers, E=4, residual", {}),
    "a part": ("4 layers, E=4, residual", {}),
    "today's parts": (
        "2 layers, every 1, E=4+8, top 2, residual",
        {"batch_size": 2 * ROWS, "accumulate": 2},
    ),
}
# Settings of the decoder: every one that differs from GPT-2's.
MODEL = {
    "bfloat16 products": {"dtype": "bfloat16"},
    "today's parts": {
        "family": "qwen2_moe", "kv_heads": 2, "head_dim": 10, "expert_d_ff": 20,
        "residual_d_ff": 24, "qk_norm": "whole", "clip_qkv": 0.5, "sliding_window": 5,
        "normalize_top_k": "always", "full_attention": "every 2", "attention_sinks": "learned",
        "activation": "clamped_swiglu", "biases": "every",
    },
}  # fmt: skip
OPTIMIZER = {
    "muon": {"kind": "muon"},
    "a part": {"kind": "muon", "trainable": r"router|experts\.w_in|^norm"},
}
# Sums in another order may round a factor of the next product to another bfloat16.
TOLERANCE = {"bfloat16 products": 2e-2}
DROPLESS = {"capacity_factor": math.inf, "eval_capacity_factor": math.inf, "overflow": "position"}
MOE = {
    "dropless": DROPLESS | {"buffer_factor": 1.0},
    "dropless, top 4": DROPLESS | {"group_size": LENGTH // 2, "dispatch": "padded"},
    "equal pieces": DROPLESS | {"dispatch": "ragged"},
    "one expert": DROPLESS | {"bias_update_rate": 0.01, "dispatch": "ragged"},
    "today's parts": DROPLESS
    | {"balance": "batch", "scores": "sigmoid", "routed_scale": 2.5, "bias_update_rate": 0.01},
}
MESHES = {
    "data": {},
    "fsdp": {"data": 1, "fsdp": 8},
    "expert": {"expert": 4},
    "tensor": {"tensor": 4},
    "sliced": {"expert": 4, "expert_slice": 2},
    "data, fsdp, expert": {"fsdp": 2, "expert": 2},
    "fsdp, expert, tensor": {"fsdp": 2, "expert": 2, "tensor": 2},
    "expert, slice, tensor": {"expert": 2, "expert_slice": 2, "tensor": 2},
    "expert, tensor, flat": {"expert": 4, "tensor": 2, "exchange": "flat"},
    "expert, tensor, coordinated": {"expert": 4, "tensor": 2, "exchange": "coordinated"},
    "two stages": {"expert": 4, "expert_inner": 2, "exchange": "hierarchical"},
    "fsdp of experts": {"data": 1, "fsdp": 2, "fsdp_experts": 2, "expert": 2},
}
# Devices in two slices of four, and in four of two. The last two spread experts over slices.
SLICES = {
    "replicas over slices": {"slices": 2, "expert": 4},
    "replicas over and in slices": {"slices": 2, "data": 4, "fsdp": 2},
    "four slices": {"slices": 4, "tensor": 2},
    "slices, fsdp, expert": {"slices": 2, "fsdp": 2, "expert": 2},
    "slices, expert, tensor": {"slices": 2, "expert": 2, "tensor": 2},
    "experts over slices": {"slices": 2, "expert": 4, "expert_inner": 2, "exchange": "hierarchical"}
    | {"data": 1, "fsdp": 2},
    "experts over two of four": {"slices": 4, "expert": 4, "expert_inner": 2}
    | {"exchange": "hierarchical"},
}

INFERENCE = "data", "expert", "sliced", "expert, slice, tensor", "two stages"


def settings(text: str, train=(), moe=(), optimizer=(), **model) -> Config:
    shape = {"vocab_size": 272, "length": LENGTH, "d_model": 24, "heads": 4, "d_ff": 40}
    fields = architecture.parse_fields(text) | shape | {"dtype": "float32", "init_std": 0.2}
    values = {
        "model": fields | {"dropout": 0.1} | model,
        "moe": {"min_capacity": 1, "overflow": "random", "aux_loss_weight": 0.1} | dict(moe),
        "train": {"steps": 10, "batch_size": ROWS} | dict(train),
        # A first AdamW step is the gradient's sign unless epsilon matters.
        "optimizer": {"eps": 1e-2, "clip_norm": 0.1} | dict(optimizer),
    }
    if model.get("dtype") == "bfloat16":
        values["execution"] = {"cpu_products": "bfloat16"}
    return resolve(values)


def spread(values: Config, mesh: dict, devices=None) -> tuple[Config, jax.sharding.Mesh]:
    """The config for one of `MESHES`, resolved, and the mesh."""
    axes = {name: size for name, size in mesh.items() if name != "exchange"}
    execution = dataclasses.replace(values.execution, exchange=mesh.get("exchange", "auto"))
    values = dataclasses.replace(values, mesh=MeshConfig(**axes), execution=execution)
    mesh = make_mesh(values, devices)
    return values, mesh


def make_batch(rows: int) -> Batch:
    return batches.make_batch(rows=rows, length=LENGTH, vocabulary=272)


def gradient_of(values: Config):
    """The loss and the gradient of the first step, with its randomness."""

    def gradient(model, batch):
        keys_B = jax.random.split(jax.random.key(3), len(batch.tokens_BxL))

        def loss(model):
            sums = forward(model, batch, keys_B, execution=values.execution)
            return training_loss(sums, totals(batch, values), values)

        loss, gradient = jax.value_and_grad(loss)(model)
        return loss, sharding.constrain(gradient)

    return gradient


def compare(ours, expected, tolerance: float = 1e-5) -> float:
    """The largest error of a leaf relative to the leaf's largest entry."""
    worst = 0.0
    for name, leaf in named_leaves(expected).items():
        leaf = np.asarray(leaf, np.float64)
        error = np.abs(np.asarray(named_leaves(ours)[name], np.float64) - leaf).max(initial=0)
        scale = max(np.abs(leaf).max(initial=0), 1e-6)
        assert error <= tolerance * scale, f"{name}: {error:.2e} of {scale:.2e}"
        worst = max(worst, error / scale)
    return worst


def buffer_of_nan(empty, *arguments) -> jax.Array:
    """What a buffer that nobody filled may hold on an accelerator."""
    return jnp.full_like(empty(*arguments), jnp.nan)


def step(name: str, *meshes: str) -> None:
    """One device against meshes, all unless named: a step's metrics, and the state after it.

    The state has every gradient in it: AdamW's first moment is a tenth of it, clipped.
    """
    text, train = ARCHITECTURES[name]
    kept = "full" if name in MOE else "none"
    moe, optimizer = MOE.get(name, {}), OPTIMIZER.get(name, {})
    values = settings(text, train, moe, optimizer, remat=kept, **MODEL.get(name, {}))
    batch = make_batch(values.train.batch_size)
    state = jax.device_get(jax.jit(init_state, static_argnums=0)(values))
    if name == "one expert":
        for block in state.model.stages[0].blocks:
            if isinstance(block.mlp, MoE):
                bias = block.mlp.bias_router
                bias.set_value(bias.get_value() + np.float32(100) * (np.arange(4) == 1))
    expected = jax.jit(make_train_step(values))(state, batch)
    metrics = to_python(expected[1], values)
    assert metrics["grad_norm"] > 0.1, "clipping does nothing"
    assert (metrics["drop_fraction"] > 0.05) == (name not in MOE), "nothing is dropped"
    exchange.LEAST_ROWS, exchange.FEW_TOKENS = 1, 0
    if name == "equal pieces":  # as on a TPU v5e
        exchange.lacks_ragged_exchange = lambda axes: True
    rounds._empty = functools.partial(buffer_of_nan, rounds._empty)
    for label in meshes or MESHES:
        here, mesh = spread(values, (MESHES | SLICES)[label])
        with jax.set_mesh(mesh):
            # The same numbers in a state whose modules know of this mesh's exchange.
            empty = jax.eval_shape(lambda: init_state(here))  # noqa: B023
            same = jax.tree.unflatten(jax.tree.structure(empty), jax.tree.leaves(state))
            placed = jax.device_put(same, sharding.shardings(empty, mesh))
            rows = split_batch(batch, mesh, len(batch.mask_BxL))
            found = compile_train_step(here, mesh)(placed, rows)
        sums = jax.device_get(found[1]["sums"])
        taken = sorted({int(router.rounds) / int(router.tokens) for router in sums.routers})
        routers = [router._replace(rounds=0 * router.rounds) for router in sums.routers]
        found[1]["sums"] = sums._replace(routers=routers)
        error = compare(found, expected, TOLERANCE.get(name, 1e-5))
        print(f"{label}: equal within {error:.1e}, rounds {taken}", flush=True)


def drops() -> None:
    """The same tokens are dropped, and the same auxiliary loss results, on 1, 2, 4, 8 devices."""
    values = settings("2 layers, E=4, top 2", {"batch_size": ROWS})
    seen = []
    for count in (1, 2, 4, 8):
        mesh = make_mesh(values, jax.devices()[:count])
        with jax.set_mesh(mesh):
            model = sharded_state(values, mesh).model
            rows = split_batch(make_batch(ROWS), mesh, ROWS)
            keys_B = jax.random.split(jax.random.key(3), ROWS)
            run = jax.jit(lambda *inputs: forward(*inputs).routers)
            (router,) = jax.device_get(run(model, rows, keys_B))
            seen.append(router)
        for field in ("assigned_E", "dropped_E", "dropped_S", "unserved"):
            np.testing.assert_array_equal(getattr(seen[-1], field), getattr(seen[0], field))
        np.testing.assert_allclose(seen[-1].aux_loss, seen[0].aux_loss, rtol=1e-6)
        print(f"{count} devices drop", *seen[-1].dropped_S)
    assert seen[0].dropped_S.sum() > 0


def collectives(hlo: str, kind: str) -> list[tuple[int, str]]:
    """(bytes of the result, groups of devices as written) of each collective of a kind."""
    found = []
    for line in hlo.splitlines():
        if match := re.search(rf"= (.*?) {kind}(?:-start)?\(", line):
            shapes = re.findall(r"(?:f32|s32|u32|pred)\[([\d,]*)\]", match[1])
            count = sum(int(np.prod([int(d) for d in dims.split(",") if d])) for dims in shapes)
            found.append((4 * count, re.search(r"replica_groups=(.*)", line)[1]))
    return found


def lowered(values: Config, mesh: jax.sharding.Mesh):
    """The gradient of the first step on a mesh, not compiled yet."""
    with jax.set_mesh(mesh):
        model = jax.eval_shape(lambda: init_model(values))
        model = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            model,
            sharding.shardings(model, mesh),
        )
        rows = split_batch(make_batch(ROWS), mesh, ROWS)
        return jax.jit(gradient_of(values)).lower(model, rows)


def replicas() -> None:
    """Gradients of experts held in bfloat16 are summed over their replicas in float32.

    As the program asks for it: a CPU's compiler would make a sum in bfloat16 one in float32.
    """
    sums = r'"stablehlo.all_reduce".*?\}\) : \(tensor<((?:\d+x)*)(\w+)>'
    values = settings("4 layers, every 1, E=4x2+8x2", dtype="bfloat16")

    def summed(mesh):
        """The dtypes of sums over devices, by their shape."""
        kinds = {}
        for dims, kind in re.findall(sums, lowered(*spread(values, mesh)).as_text(), re.DOTALL):
            kinds.setdefault(dims.rstrip("x"), set()).add(kind)
        return kinds

    # Two layers of 4 experts and two of 8: how many of each a device holds, and their hidden units.
    for mesh, first, second, d_ff in (
        ({}, 4, 8, 40),
        ({"fsdp": 2, "expert": 2}, 2, 4, 40),
        ({"expert": 2, "expert_slice": 2}, 2, 4, 20),
        ({"expert": 8}, 1, 1, 40),
    ):
        kinds = summed(mesh)
        # Eight experts on eight devices have no replicas, and are cast before their layer.
        expected = {"f32", "bf16"} if second == 1 else {"f32"}
        for experts in (first, second):
            for dims in ("24x{}", "{}", "{}x24"):
                dims = f"{experts}x{dims.format(d_ff)}"
                assert kinds[dims] == expected, (mesh, dims, kinds)
    # Four devices share the experts, whose width is 24: replicas sum their own part.
    kinds = summed({"data": 2, "fsdp_experts": 4})
    for experts in 4, 8:
        assert kinds[f"{experts}x6x40"] == kinds[f"{experts}x40x6"] == {"f32"}, kinds
        assert f"{experts}x24x40" not in kinds and f"{experts}x40x24" not in kinds
    print("checked")


def exchanges() -> None:
    """What the compiled gradient exchanges, and that no expert's weights are gathered."""
    d_ff = 400
    one_expert = 4 * 24 * d_ff
    both_halves = {(0, 1, 2, 3), (4, 5, 6, 7)}

    def compiled(text, label=None, remat="dots", **mesh):
        changes = {"d_ff": d_ff, "remat": remat}
        values, mesh = spread(settings(text, **changes), MESHES[label] if label else mesh)
        hlo = lowered(values, mesh).compile().as_text()
        for size, _ in collectives(hlo, "all-gather"):
            assert size < one_expert, f"{size} bytes gathered"
        found = collectives(hlo, "all-to-all")
        return [(size, frozenset(map(tuple, groups(text, 8).tolist()))) for size, text in found]

    # A stage of 4 experts and one of 8 on 8 devices: forward there and back, backward the same.
    found = compiled("4 layers, every 1, E=4x2+8x2", expert=8)
    assert [g for _, g in found].count(frozenset(both_halves)) == 4, found
    assert [g for _, g in found].count(frozenset({tuple(range(8))})) == 4, found
    assert len(found) == 8, found
    # Rematerialisation repeats none of them; where everything is kept, the two layers are unrolled.
    for remat, expected in (("dots", 4), ("full", 4), ("none", 8)):
        again = compiled("2 layers, every 1, E=8", remat=remat, expert=8)
        assert len(again) == expected, (remat, again)
    # Two stages: neighbours first, then one of each pair.
    found = compiled("2 layers, every 1, E=8", expert=8, expert_inner=2, exchange="hierarchical")
    inner = frozenset((i, i + 1) for i in range(0, 8, 2))
    outer = frozenset({(0, 2, 4, 6), (1, 3, 5, 7)})
    assert sorted([g for _, g in found], key=len) == [outer] * 4 + [inner] * 4, found
    # Rows that two devices hold alike: each sends half of them.
    flat = compiled("2 layers, every 1, E=4", "expert, tensor, flat")
    coordinated = compiled("2 layers, every 1, E=4", "expert, tensor, coordinated")
    assert len(flat) == len(coordinated) == 4
    assert sum(size for size, _ in flat) == 2 * sum(size for size, _ in coordinated) > 0
    assert {g for _, g in flat + coordinated} == {frozenset({(0, 2, 4, 6), (1, 3, 5, 7)})}
    # FSDP beside experts: parameters are gathered, experts are not.
    assert len(compiled("2 layers, every 1, E=4", "data, fsdp, expert")) == 4
    print("checked")


def across_slices() -> None:
    """What crosses slices in the compiled gradient: sums, and rows if experts cross them."""
    pair = {"experts over two of four": {(0, 2)}}
    for label in ("replicas over and in slices", "slices, fsdp, expert", *pair):
        layout = SLICES[label]
        values, mesh = spread(settings("2 layers, every 1, E=4", remat="dots"), layout)
        program = lowered(values, mesh)
        # Two devices of a slice share the width of 24: each sums its own half of the table's.
        sums = r'"stablehlo.all_reduce".*?\}\) : \(tensor<(\d+x\d+)xf32>\)'
        summed = set(re.findall(sums, program.as_text(), re.DOTALL))
        assert "272x12" in summed and "272x24" not in summed, (label, summed)
        hlo = program.compile().as_text()
        slices = layout["slices"]
        crossing = {}
        for kind in COLLECTIVES:
            for _, text in collectives(hlo, kind):
                first = groups(text, 8)[0]
                if len(set(first * slices // 8)) > 1:
                    crossing.setdefault(kind, set()).add(tuple(first.tolist()))
        everywhere = crossing.pop("all-reduce")
        assert all(len({i * slices // 8 for i in group}) > 1 for group in everywhere)
        # A device exchanges with that of its place in the other slice, and with no other.
        expected = {"all-to-all": pair[label]} if label in pair else {}
        assert crossing == expected, (label, crossing)
    print("checked")


def vocabulary() -> None:
    """For each chunk of logits numbers of tokens cross devices, and the table's gradient once."""
    chunks.CPU_CHUNK = 8  # several chunks, in a loop
    words, half = 5120, 2560
    for mesh in ({"tensor": 2, "data": 4}, {"tensor": 2, "fsdp": 4}):
        values = settings("2 layers, E=4", vocab_size=words, remat="dots")
        hlo = lowered(*spread(values, mesh)).compile().as_text()
        sizes = {"chunk": set(), "entry": set()}
        where = ""
        for line in hlo.splitlines():
            if line.endswith("{"):  # the head of a computation; loops have bodies of their own
                where = "entry" if line.startswith("ENTRY") else "chunk"
            kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
            if match := re.search(rf"= (.*?) (?:{kinds})(?:-start)?\(", line):
                shapes = re.findall(r"\[([\d,]+)\]", match[1])
                sizes[where] |= {int(n) for shape in shapes for n in shape.split(",")}
        assert sizes["chunk"] and not sizes["chunk"] & {words, half}, sizes
        assert half in sizes["entry"] and words not in sizes["entry"], sizes
    print("checked")


def checkpoints(folder: str) -> None:
    values = settings("4 layers, E=4+8, residual")
    chosen = ["data", "fsdp", "expert", "expert, slice, tensor", "two stages"]
    record = {"fingerprint": {}, "iterator": {"next_index": 1}}
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_state(values))
    state = jax.tree.map(lambda x: rng.integers(0, 99, x.shape).astype(x.dtype), shapes)
    state = state._replace(step=np.int32(1))
    for source in chosen:
        _, mesh = spread(values, MESHES[source])
        store = Checkpoints(Path(folder) / source, keep=1)
        store.save(1, jax.device_put(state, sharding.shardings(state, mesh)), record)
        store.wait()
        store.close()
        for target in chosen:
            there, mesh = spread(values, MESHES[target])
            store = Checkpoints(Path(folder) / source)
            number, restored, data = store.restore(shapes, mesh)
            store.close()
            assert (number, data) == (1, record)
            for name, leaf in named_leaves(restored).items():
                expected = sharding.spec(name, leaf.shape, mesh)
                assert leaf.sharding.is_equivalent_to(
                    jax.sharding.NamedSharding(mesh, expected), leaf.ndim
                ), name
                np.testing.assert_array_equal(leaf, named_leaves(state)[name], err_msg=name)
            print(f"{source} -> {target}: restored")


def evaluates(folder: str) -> None:
    """A run of 6 sequences a step, on 8 devices and on one: the same, a teacher's part too.

    Its routing groups are two windows: 16 are evaluated at once. The teacher's are three: 48.
    """
    root = Path(folder)
    words = "the expert of a token is chosen by its router and so on".split()
    for i in range(30):
        (root / f"{i}.txt").write_text(" ".join(words[j * i % 12] for j in range(400)))
    data = {"corpus": f"{root}/*.txt", "tokenizer": "bytes", "cache_dir": str(root / "cache")}
    for name, windows in (("run", 2), ("teacher", 3)):
        values = settings("2 layers, E=4, residual", {"batch_size": 6}, init_std=0.3)
        moe = dataclasses.replace(values.moe, group_size=windows * LENGTH, overflow="position")
        values = dataclasses.replace(values, moe=moe, data=DataConfig(**data), seed=windows)
        (root / name).mkdir()
        save(resolve(dataclasses.asdict(values)), root / name / "config.json")
        byte_tokenizer().save(root / name / "tokenizer.json")
        store = Checkpoints(root / name, keep=1)
        store.save_model(1, init_model(values), {})
        store.close()

    def evaluated(**where):
        restore = functools.partial(restore_run, **where)
        with mock.patch.object(evaluate, "restore_run", restore):
            return evaluate.evaluate(root / "run", root / "teacher")

    def documents(**where):
        config, _, model, mesh = restore_run(root / "run", **where)
        text = load_data(
            config.data, config.model.vocab_size, LENGTH, root / "run" / "tokenizer.json"
        )
        with jax.set_mesh(mesh):
            measure = functools.partial(forward, measure=token_losses)
            measure = jax.jit(measure, out_shardings=replicated(mesh))
            found = evaluate.evaluate_model(measure, model, config, text, mesh, documents=True)
            return found["documents"]

    alone, spread_out = evaluated(devices=jax.devices()[:1]), evaluated()
    assert alone.keys() == spread_out.keys()
    assert 0.05 < alone["drop_fraction"] < 0.95 and alone["teacher/kl"] > 0.01
    for name, value in alone.items():
        np.testing.assert_allclose(spread_out[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    found = [documents(devices=jax.devices()[:1]), documents()]
    assert len(found[0]) > 1
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=0.011)
    nats, count = np.sum(found[1], 0)
    assert count == alone["tokens"] and abs(nats / count - alone["loss"]) < 1e-5
    print(f"equal over {alone['tokens']} tokens")


def generates(parts: str = "", *meshes: str) -> None:
    """Every mesh continues prompts of different lengths as one device does, token by token."""
    shape = {"length": 64, "init_std": 0.3} | MODEL.get(parts, {})
    values = settings("4 layers, E=4+8, residual", **shape)
    prompts, expected = ["a", "of the people", "we"], {}
    layouts = {"one": {}} | {name: MESHES[name] for name in meshes or INFERENCE}
    for name, layout in layouts.items():
        on, mesh = spread(values, layout, jax.devices()[:1] if name == "one" else None)
        narrow_too = name in ("one", "expert, slice, tensor")
        for kind in ("float32", "int8") if narrow_too else ("float32",):
            with jax.set_mesh(mesh):
                model = init_model(on)
                placed = jax.device_put(model, sharding.shardings(model, mesh))
                generator = Generator(
                    decoder(placed, kind, mesh, on.execution), byte_tokenizer(), mesh
                )
                texts = generator(prompts, 20, Sampling(1.0), [1, 2, 3])
            assert texts == expected.setdefault(kind, texts), (name, kind, texts, expected)
            print(name, kind, "equal", flush=True)


def scores(*meshes: str) -> None:
    """Every mesh scores texts of different lengths as one device does."""
    values = settings("4 layers, E=4+8, residual", length=64, init_std=0.3)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 272, size).tolist() for size in rng.integers(2, 80, 19)]
    contexts = [text[: len(text) // 2] for text in texts]
    continuations = [text[len(text) // 2 :] for text in texts]
    exchange.LEAST_ROWS, exchange.FEW_TOKENS = 1, 0
    rounds._empty = functools.partial(buffer_of_nan, rounds._empty)
    expected = None
    layouts = {"one": {}} | {name: (MESHES | SLICES)[name] for name in meshes}
    for name, layout in layouts.items():
        on, mesh = spread(values, layout, jax.devices()[:1] if name == "one" else None)
        with jax.set_mesh(mesh):
            model = init_model(on)
            placed = jax.device_put(model, sharding.shardings(model, mesh))
        found = np.array(Scorer(placed, mesh, 1, on.execution)(contexts, continuations))
        expected = found if expected is None else expected
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        print(name, "equal", flush=True)


def spied(name: str):
    """Counts the calls of a method of the exchange."""
    own = exchange.ExpertParallel
    return mock.patch.object(own, name, autospec=True, side_effect=getattr(own, name))


def kernels_of_check() -> None:
    """Each exchange that `prmoe check` runs without drops goes the way that its name has."""
    ways = {}
    for case in kernels.cases(jax.devices()):
        if case.name.startswith("exchange") and "nothing dropped" in case.name:
            with jax.set_mesh(case.mesh), spied("grouped") as many, spied("of_few") as few:
                jax.eval_shape(functools.partial(case.ours, jnp.float32), *case.arguments)
            ways[case.name] = many.call_count, few.call_count
    print("calls of each, in rounds and everywhere:", ways)
    assert ways == {
        "exchange flat, nothing dropped": (1, 0),
        "exchange coordinated, nothing dropped": (1, 0),
        "exchange flat, few tokens, nothing dropped": (0, 1),
    }


def prefills() -> None:
    """Experts on eight devices get their own rows, not all, and multiply about as many in all.

    Only the exchange's first round is compiled, since the compiler would count further ones whether
    they are run or not. It counts a loop's body once, so that further blocks are not counted.
    """
    values = settings("2 layers, every 1, E=32", length=128)
    tokens = np.zeros((ROWS, 2 * PREFILL_CHUNK), np.int32)
    length_B, keys_B = np.full(ROWS, PREFILL_CHUNK), jax.random.split(jax.random.key(0), ROWS)
    work = {}
    for count in (1, 8):
        on, mesh = spread(values, {"expert": count}, jax.devices()[:count])
        with jax.set_mesh(mesh):
            model = init_model(on)
            placed = jax.device_put(model, sharding.shardings(model, mesh))
            inputs = (
                decoder(placed, "float32", mesh, on.execution),
                tokens,
                length_B,
                length_B,
                keys_B,
            )
            first_round = mock.patch.object(jax.lax, "while_loop", lambda _, __, carry: carry)
            with spied("of_few") as of_few, first_round:
                program = prefill.lower(*inputs, 1).compile()
        assert not of_few.called
        work[count] = count * program.cost_analysis()["flops"]
    print(f"{work[8] / work[1]:.2f} times the work")
    assert work[8] < 2 * work[1]


def verbs(commands: str) -> None:
    """Runs a JSON list of command lines."""
    for command in json.loads(commands):
        assert main(command) == 0


def serve() -> None:
    """Runs cases by fork, so that only the first waits for the imports.

    Each line that it reads is a JSON list: the case, its arguments, and files for what it writes to
    standard output and standard error. Each line that it writes is the exit code.
    """
    for line in sys.stdin:
        case, *arguments, out, err = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, path in enumerate((out, err), start=1):
                with open(path, "wb") as file:
                    os.dup2(file.fileno(), number)
            code = 1
            try:
                globals()[case](*arguments)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
