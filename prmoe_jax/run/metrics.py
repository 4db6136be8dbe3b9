"""Turns a step's sums into metrics; writes them to files and to Weights & Biases."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import logging
import math
import os
import platform
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from prmoe_jax import files, stores
from prmoe_jax.config.schema import Config
from prmoe_jax.errors import UserError, first_line, refusing
from prmoe_jax.moe.routing import RouterMetrics
from prmoe_jax.run.directory import METRICS
from prmoe_jax.tables import aligned

log = logging.getLogger(__name__)
T = TypeVar("T")

# Dense bfloat16 peak of one device in FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # a device is half a chip
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def summarise(sums, config: Config) -> dict:
    """Turns the sums of a `loss.Sums` into means, as plain numbers and lists.

    docs/quickstart.md describes the metrics. A choice is one of a token's top-k assignments. If
    experts choose tokens, each token counts as one choice, dropped if no expert took the token.
    It runs on the host; as a part of the compiled step it would be many small kernels.
    """
    sums = jax.device_get(sums)
    metrics = {
        "lm_loss": _share(sums.lm_loss, sums.tokens),
        "z_loss": _share(sums.z_loss, sums.tokens),
        "aux_loss": np.float32(0),
    }
    if sums.kd_loss is not None:
        metrics["kd_loss"] = _share(sums.kd_loss, sums.tokens)
    moe_layers = [i for i, experts in enumerate(config.model.schedule.experts) if experts]
    for i, router in zip(moe_layers, sums.routers, strict=True):
        layer = _of_router(router, config.model.residual)
        metrics |= {f"layers/{i:02d}/{name}": value for name, value in layer.items()}
        metrics["aux_loss"] += layer["aux_loss"]
    dropped = sum(router.dropped_S.sum() for router in sums.routers)
    choices = sum(router.choices_S.sum() for router in sums.routers)
    metrics["drop_fraction"] = _share(dropped, choices)
    return {name: value.tolist() for name, value in metrics.items()}


def _of_router(router: RouterMetrics, residual: bool) -> dict[str, np.ndarray]:
    """The metrics of one MoE layer."""
    load_E = _share(router.assigned_E, router.assigned_E.sum())
    aux_loss = _share(router.aux_loss, router.groups)
    if router.prob_E is not None:
        aux_loss = len(load_E) * (load_E * _share(router.prob_E, router.tokens)).sum()
    weight, weight_square = (
        _share(total, router.tokens) for total in (router.weight, router.weight_square)
    )
    by_place = _share(_in_parts(router.dropped_S), _in_parts(router.choices_S))
    layer = {
        "aux_loss": aux_loss,
        "router_z_loss": _share(router.z_loss, router.tokens),
        "drop_fraction": _share(router.dropped_S.sum(), router.choices_S.sum()),
        "expert_load": load_E,
        "expert_drop_fraction": _share(router.dropped_E, router.assigned_E),
        "position_drop_fraction": by_place,
        "unserved_fraction": _share(router.unserved, router.tokens),
        "router_entropy": _share(router.entropy, router.tokens),
        "router_weight": weight,
        "router_weight_std": np.sqrt(np.maximum(weight_square - weight**2, 0)),
        "added_norm": np.sqrt(router.added_square / np.maximum(router.stream_square, 1e-30)),
        "dead_experts": (router.assigned_E == 0).sum(),
    }
    if residual:
        whole, dropped = router.coefficient, router.coefficient_unserved
        served = router.tokens - router.unserved
        layer["residual_coefficient"] = _share(whole, router.tokens)
        layer["residual_coefficient_kept"] = _share(whole - dropped, served)
        layer["residual_coefficient_dropped"] = _share(dropped, router.unserved)
    if router.rounds:
        layer["exchange_rounds"] = _share(router.rounds, router.tokens)
    return layer


def _share(part, whole) -> np.ndarray:
    """part / whole in float32; 0 if `whole` is 0."""
    return np.asarray(part, np.float32) / np.asarray(np.maximum(whole, 1), np.float32)


def _in_parts(count_S: np.ndarray) -> np.ndarray:
    """Counts by token position, summed over up to 16 equal parts of a routing group."""
    tokens = len(count_S)
    parts = min(16, tokens)
    return np.bincount(np.arange(tokens) * parts // tokens, count_S, parts)


def to_python(metrics: dict, config: Config) -> dict:
    """A step's metrics as plain numbers and lists; waits until the step has computed them."""
    metrics = jax.device_get(metrics)
    sums = metrics.pop("sums")
    return {name: value.tolist() for name, value in metrics.items()} | summarise(sums, config)


def loss_parts(metrics: dict, config: Config) -> dict[str, float]:
    """What a step's loss has beside the language model's, weighted, by name, without zeros.

    `metrics` are those of `to_python`. `lm_loss` and the parts add up to `loss`.
    """
    router_z = sum(x for name, x in metrics.items() if name.endswith("/router_z_loss"))
    parts = {
        "balance": config.moe.aux_loss_weight * metrics["aux_loss"],
        "router z-loss": config.moe.z_loss_weight * router_z,
        "z-loss": config.train.z_loss * metrics["z_loss"],
        "distillation": metrics.get("kd_weight", 0.0) * metrics.get("kd_loss", 0.0),
    }
    return {name: value for name, value in parts.items() if value}


def model_flops_utilisation(flops_per_second: float) -> float | None:
    """Model FLOPs as a share of the devices' peak; None if the peak is unknown."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return flops_per_second / (peak * jax.device_count()) if peak else None


_FIX = "delete that line, or restore a copy of the file"
# Objects can't be appended to, so files in a store are always written whole. After a write,
# the next one waits `EVERY` seconds, or `SHARE` times the write's duration if this is longer.
EVERY, SHARE = 30.0, 20


class MetricsWriter:
    """Appends to metrics.jsonl and to TensorBoard's file; only process 0 has one.

    Each logged step is a line of metrics.jsonl, and each evaluation is another line. If the run is
    in an object store, the files are written to this machine's disk, and `sync` copies them to the
    store now and then. A crash loses the lines since the last `sync`. A run therefore calls `sync`
    before each checkpoint: the resumed run repeats the steps of lost lines.
    """

    def __init__(self, workdir: Path, resume_step: int, check: Callable[[], None] = lambda: None):
        """Opens the files, and removes lines that an interrupted run logged after `resume_step`.

        The resumed run logs those steps again. On the same mesh, all values but those of speed are
        equal to the last bit. `check` is called before each write to an object store.
        """
        self._workdir, self._check = workdir, check
        self._cleanup, self._folder = contextlib.ExitStack(), workdir
        kept = [m for m in read_metrics(workdir / METRICS) if m["step"] <= resume_step]
        with self._refusing():
            if not stores.is_local(workdir):
                temporary = tempfile.TemporaryDirectory(prefix="prmoe-")
                self._folder = Path(self._cleanup.enter_context(temporary))
            if kept or (self._folder / METRICS).exists():
                write_metrics(self._folder, kept)
            (self._folder / "tensorboard").mkdir(exist_ok=True)
            parts = f"{time.time():.0f}", platform.node(), str(os.getpid()), str(resume_step + 1)
            events = f"tensorboard/events.out.tfevents.{'.'.join(parts)}"
            self._lines, self._events = (
                open(self._folder / name, "ab", opener=stores.no_link) for name in (METRICS, events)
            )
            self._append_event(0, file_version="brain.Event:2")
            # This event makes TensorBoard ignore older events of the steps that are repeated.
            self._append_event(resume_step + 1, session_log={"status": 1})
        self._changed, self._due = False, time.monotonic() + EVERY

    def write(self, line: dict) -> None:
        """Writes a line, which has the step, and flushes it; calls `sync` when it is time."""
        numbers = {name: v for name, v in _numbers(line).items() if name != "step"}
        values = [{"tag": name, "simple_value": value} for name, value in numbers.items()]
        with self._refusing():
            self._lines.write((json.dumps(line) + "\n").encode())
            self._lines.flush()
            self._append_event(line["step"], summary={"value": values})
        self._changed = True
        if time.monotonic() >= self._due:
            self.sync()

    def sync(self) -> None:
        """Copies the files to the object store if they have grown; does nothing for a local run."""
        if self._folder == self._workdir or not self._changed:
            return
        begun = time.monotonic()
        with self._refusing():
            self._check()
            stores.upload(self._folder, self._workdir)
        end = time.monotonic()
        self._changed, self._due = False, end + max(EVERY, SHARE * (end - begun))

    def close(self) -> None:
        with self._cleanup, contextlib.suppress(OSError, UserError):  # reported before
            self._lines.close()
            self._events.close()
            self.sync()

    def _refusing(self):
        return refusing(f"{self._workdir / METRICS} cannot be written", OSError)

    def _append_event(self, step: int, **content) -> None:
        """Writes an event in TensorBoard's format: length and event, a checksum after each."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        event = Event(wall_time=time.time(), step=step, **content).SerializeToString()
        for part in (struct.pack("<Q", len(event)), event):
            self._events.write(part + struct.pack("<I", masked_crc32c(part)))
        self._events.flush()


def _numbers(line: dict) -> dict[str, float]:
    return {name: value for name, value in line.items() if isinstance(value, (int, float))}


def read_metrics(path: Path) -> list[dict]:
    """Reads the lines of a metrics.jsonl; warns of a last line torn by a crash, and omits it."""
    return files.read_json_lines(path, {"step": int}, _FIX)


def write_metrics(workdir: Path, lines: list[dict]) -> None:
    """Replaces a run's metrics.jsonl."""
    files.replace(workdir / METRICS, "".join(json.dumps(line) + "\n" for line in lines))


def finished(config: Config, workdir: Path) -> bool:
    """Whether a run's metrics have the evaluation after its last step, with a finite loss."""
    last = [{"step": -1}, *read_metrics(workdir / METRICS)][-1]
    loss = last.get("eval/loss", math.nan)
    finite = not isinstance(loss, float) or math.isfinite(loss)
    return finite and last["step"] == config.total_steps


# A router is called uniform from this share of the largest entropy on, ln E, and the experts'
# output too small below this share of the residual stream.
UNIFORM, VANISHING = 0.98, 0.01


def entropy_share(layer: dict) -> float:
    """The router's entropy divided by that of a uniform router, ln E; 0 for one expert."""
    experts = len(layer["expert_load"])
    return layer["router_entropy"] / math.log(experts) if experts > 1 else 0.0


def fullest(layer: dict) -> float:
    """The load of the fullest expert divided by an even share."""
    return max(layer["expert_load"]) * len(layer["expert_load"])


def ailing(metrics: dict) -> dict[str, str]:
    """What is wrong with the routers of an evaluation, by layer."""
    found = {}
    for layer in _layers(metrics):
        value = of_layer(metrics, layer)
        if (share := entropy_share(value)) >= UNIFORM:
            found[layer] = f"its router is nearly uniform: the entropy is {share:.1%} of ln E"
        elif (added := value["added_norm"]) < VANISHING:
            found[layer] = (
                f"the norm of its experts' output is {added:.2%} of the residual stream's"
            )
    return found


# What `router_table` reads of each layer.
_ROUTER = dict.fromkeys(("drop_fraction", "unserved_fraction", "router_entropy"), (int, float))
_ROUTER |= dict.fromkeys(("expert_load", "expert_drop_fraction", "position_drop_fraction"), list)
# The columns of `router_table`, and those of choices that were dropped. A layer without a column's
# metric has an empty field, and a column that no layer has is left out.
_HEALTH = {
    "of ln E": lambda of: f"{entropy_share(of):.3f}",
    "fullest expert": lambda of: f"{fullest(of):.2f}x even",
    "dead": lambda of: f"{of['dead_experts']} of {len(of['expert_load'])}",
    "weight": lambda of: f"{of['router_weight']:.3f} ± {of['router_weight_std']:.3f}",
    "norm / stream": lambda of: f"{of['added_norm']:.3f}",
    "without experts": lambda of: f"{of['loss_without_experts']:+.4f} nats",
    "permuted": lambda of: f"{of['loss_of_permuted_experts']:+.4f} nats",
}
_DROPS = {
    "dropped": lambda of: f"{of['drop_fraction']:.1%}",
    "unserved": lambda of: f"{of['unserved_fraction']:.1%}",
    "experts drop": lambda of: "{:.1%} – {:.1%}".format(
        min(of["expert_drop_fraction"]), max(of["expert_drop_fraction"])
    ),
    "first to last place in the group": lambda of: _bars(of["position_drop_fraction"]),
}


def router_table(metrics: dict) -> str:
    """A text table of each MoE layer's router and, if any are dropped, of its dropped choices."""
    layers = {layer: of_layer(metrics, layer) for layer in _layers(metrics)}
    for layer, of in layers.items():
        files.require(of, _ROUTER, f"metrics.jsonl: the last line's layer {layer}", _FIX)
    drops = any(of["drop_fraction"] or of["unserved_fraction"] for of in layers.values())
    columns = {"layer": list(layers)}
    for head, cell in (_HEALTH | (_DROPS if drops else {})).items():
        cells = [read(cell, of) or "" for of in layers.values()]
        if any(cells):
            columns[head] = cells
    return aligned(tuple(columns), list(zip(*columns.values(), strict=True))) if layers else ""


def read(value: Callable[[dict], T], layer: dict) -> T | None:
    """`value(layer)`; None if the layer's metrics lack what it reads, as in older lines."""
    try:
        return value(layer)
    except KeyError:
        return None


def _bars(by_place: list[float]) -> str:
    top = max(*by_place, 1e-9)
    bars = "".join("▁▂▃▄▅▆▇█"[round(7 * share / top)] for share in by_place)
    return f"{bars} {by_place[0]:.1%} – {by_place[-1]:.1%}"


def _layers(metrics: dict) -> list[str]:
    return sorted({name.split("/")[1] for name in metrics if name.startswith("layers/")})


def of_layer(metrics: dict, layer: str) -> dict:
    """The metrics of one MoE layer, such as '03', by the rest of their names."""
    prefix = f"layers/{layer}/"
    return {n.removeprefix(prefix): x for n, x in metrics.items() if n.startswith(prefix)}


def check_wandb(config: Config) -> None:
    """Raises UserError if the config asks for Weights & Biases and its package is missing."""
    if config.log.wandb and not importlib.util.find_spec("wandb"):
        raise UserError(
            f"log.wandb={config.log.wandb} needs a package; pip install 'prmoe_jax[wandb]'"
        )


class WandbRun:
    """A run at Weights & Biases. A resumed run continues it; repeated steps appear there twice.

    If Weights & Biases fails, training goes on without it; metrics.jsonl has everything.
    """

    def __init__(self, config: Config, workdir: Path, begun: float):
        """Starts or continues the run of this folder that was first started at `begun`."""
        import wandb

        identity = hashlib.sha256(f"{os.fspath(workdir)} {begun}".encode()).hexdigest()[:12]
        self._failures = wandb.errors.Error, OSError
        advice = "run wandb login, or set WANDB_MODE=offline"
        with refusing(f"log.wandb={config.log.wandb}", self._failures, fix=advice):
            self._run = wandb.init(
                project=config.log.wandb,
                name=workdir.name,
                id=identity,
                resume="allow",
                config=dataclasses.asdict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        # W&B's own counter never goes back, but a resumed run does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, line: dict) -> None:
        """Sends the numbers of a line of metrics.jsonl."""
        self._send(lambda run: run.log(_numbers(line)))

    def close(self) -> None:
        """Sends what is left."""
        self._send(lambda run: run.finish())

    def _send(self, act: Callable) -> None:
        try:
            if self._run:
                act(self._run)
        except self._failures as error:
            log.warning("log.wandb: %s; no more is sent there", first_line(error))
            self._run = None
