"""Turns a step's sums into the metrics that people read, and writes them to files."""

import contextlib
import json
import math
import os
import platform
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import jax
import numpy as np

from prmoe_jax import files, stores
from prmoe_jax.config.schema import Config
from prmoe_jax.errors import UserError, refusing
from prmoe_jax.run.directory import METRICS
from prmoe_jax.tables import aligned

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
    """Turns the sums of a `loss.Sums` into means.

    It runs on the host; as a part of the compiled step it would be many small kernels. A choice is
    one of a token's top-k assignments. If experts choose tokens, each token counts as one choice,
    dropped if no expert took the token.

    Returns:
      Plain numbers and lists. For the whole model: lm_loss (nats per token), z_loss, aux_loss
      (summed over MoE layers), drop_fraction (share of choices dropped for lack of capacity) and,
      with a teacher, kd_loss (T² · KL in nats per token, without its weight).
      For each MoE layer, with names that start with its number ('layers/03/'): aux_loss,
      router_z_loss, drop_fraction, router_entropy (nats), and
        expert_load: each expert's share of all choices, [E].
        expert_drop_fraction: dropped share of each expert's choices, [E].
        position_drop_fraction: dropped share by position in the routing group, in up to 16 parts.
        unserved_fraction: share of tokens whose choices were all dropped.
        exchange_rounds: only where experts are on several devices and nothing is dropped; above 1
          if some buffer was too small for its rows (`execution.buffer_factor`).
        residual_coefficient: mean weight of the experts beside the residual MLP (shared expert);
          its means over tokens that an expert kept, and over the others, end in _kept and _dropped.
    """
    sums = jax.device_get(sums)
    metrics = {
        "lm_loss": _share(sums.lm_loss, sums.tokens),
        "z_loss": _share(sums.z_loss, sums.tokens),
        "aux_loss": np.float32(0),
    }
    if sums.kd_loss is not None:
        metrics["kd_loss"] = _share(sums.kd_loss, sums.tokens)
    dropped = choices = 0
    moe_layers = [i for i, experts in enumerate(config.model.schedule.experts) if experts]
    for i, router in zip(moe_layers, sums.routers, strict=True):
        aux_loss = _share(router.aux_loss, router.groups)
        if router.prob_E is not None:
            load_E = _share(router.assigned_E, router.assigned_E.sum())
            aux_loss = len(load_E) * (load_E * _share(router.prob_E, router.tokens)).sum()
        layer = {
            "aux_loss": aux_loss,
            "router_z_loss": _share(router.z_loss, router.tokens),
            "drop_fraction": _share(router.dropped_S.sum(), router.choices_S.sum()),
            "expert_load": _share(router.assigned_E, router.assigned_E.sum()),
            "expert_drop_fraction": _share(router.dropped_E, router.assigned_E),
            "position_drop_fraction": _share(
                _in_parts(router.dropped_S), _in_parts(router.choices_S)
            ),
            "unserved_fraction": _share(router.unserved, router.tokens),
            "router_entropy": _share(router.entropy, router.tokens),
        }
        if config.model.residual:
            served = router.tokens - router.unserved
            coefficient_served = router.coefficient - router.coefficient_unserved
            layer |= {
                "residual_coefficient": _share(router.coefficient, router.tokens),
                "residual_coefficient_kept": _share(coefficient_served, served),
                "residual_coefficient_dropped": _share(
                    router.coefficient_unserved, router.unserved
                ),
            }
        if router.rounds:
            layer["exchange_rounds"] = _share(router.rounds, router.tokens)
        metrics |= {f"layers/{i:02d}/{name}": value for name, value in layer.items()}
        metrics["aux_loss"] += layer["aux_loss"]
        dropped += router.dropped_S.sum()
        choices += router.choices_S.sum()
    metrics["drop_fraction"] = _share(dropped, choices)
    return {name: value.tolist() for name, value in metrics.items()}


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
        equal to the last bit.

        Args:
          workdir: the run's folder.
          resume_step: the step of the checkpoint with which the run goes on.
          check: called before each write to an object store.
        """
        self._workdir, self._check = workdir, check
        self._cleanup, self._folder = contextlib.ExitStack(), workdir
        kept = [m for m in read_metrics(workdir / METRICS) if m["step"] <= resume_step]
        with self._refusing():
            if not stores.is_local(workdir):
                temporary = tempfile.TemporaryDirectory(prefix="prmoe-")
                self._folder = Path(self._cleanup.enter_context(temporary))
            content = "".join(json.dumps(m) + "\n" for m in kept)
            if kept or (self._folder / METRICS).exists():
                files.replace(self._folder / METRICS, content)
            (self._folder / "tensorboard").mkdir(exist_ok=True)
            self._lines, self._events = map(self._open, (METRICS, _name_of_events(resume_step)))
            self._append_event(0, file_version="brain.Event:2")
            # This event makes TensorBoard ignore older events of the steps that are repeated.
            self._append_event(resume_step + 1, session_log={"status": 1})
        self._changed, self._due = False, time.monotonic() + EVERY

    def write(self, step: int, metrics: dict) -> None:
        """Writes one line and flushes it; calls `sync` when it is time."""
        with self._refusing():
            self._lines.write((json.dumps({"step": step, **metrics}) + "\n").encode())
            self._lines.flush()
            numbers = [(n, v) for n, v in metrics.items() if isinstance(v, (int, float))]
            values = [{"tag": name, "simple_value": value} for name, value in numbers]
            self._append_event(step, summary={"value": values})
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

    def _open(self, name: str) -> BinaryIO:
        return open(self._folder / name, "ab", opener=stores.no_link)

    def _append_event(self, step: int, **content) -> None:
        """Writes an event in TensorBoard's format: length and event, a checksum after each."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        event = Event(wall_time=time.time(), step=step, **content).SerializeToString()
        for part in (struct.pack("<Q", len(event)), event):
            self._events.write(part + struct.pack("<I", masked_crc32c(part)))
        self._events.flush()


def _name_of_events(resume_step: int) -> str:
    """The name of a new file for TensorBoard."""
    parts = f"{time.time():.0f}", platform.node(), str(os.getpid()), str(resume_step + 1)
    return f"tensorboard/events.out.tfevents.{'.'.join(parts)}"


def read_metrics(path: Path) -> list[dict]:
    """Reads the lines of a metrics.jsonl; warns of a last line torn by a crash, and omits it."""
    return files.read_json_lines(path, {"step": int}, _FIX)


def finished(config: Config, workdir: Path) -> bool:
    """Whether a run's metrics have the evaluation after its last step, with a finite loss."""
    lines = read_metrics(workdir / METRICS)
    if not lines or lines[-1]["step"] != config.total_steps:
        return False
    loss = lines[-1].get("eval/loss", math.nan)
    return not isinstance(loss, float) or math.isfinite(loss)


# What `router_table` shows of each layer.
_ROUTER = dict.fromkeys(("drop_fraction", "unserved_fraction", "router_entropy"), (int, float))
_ROUTER |= dict.fromkeys(("expert_load", "expert_drop_fraction", "position_drop_fraction"), list)


def router_table(metrics: dict) -> str:
    """A text table of the choices that each MoE layer drops, by expert and by position."""
    layers = sorted({name.split("/")[1] for name in metrics if name.startswith("layers/")})
    if not layers:
        return ""
    head = "layer", "dropped", "unserved", "entropy", "fullest expert", "experts drop"
    rows = []
    for layer in layers:
        value = of_layer(metrics, layer)
        files.require(value, _ROUTER, f"metrics.jsonl: the last line's layer {layer}", _FIX)
        load, by_expert = value["expert_load"], value["expert_drop_fraction"]
        by_place = value["position_drop_fraction"]
        rows.append(
            (
                layer,
                f"{value['drop_fraction']:.1%}",
                f"{value['unserved_fraction']:.1%}",
                f"{value['router_entropy']:.3f}",
                f"{max(load) * len(load):.2f}x even",
                f"{min(by_expert):.1%} – {max(by_expert):.1%}",
                f"{bars(by_place)} {by_place[0]:.1%} – {by_place[-1]:.1%}",
            )
        )
    return aligned((*head, "first to last place in the group"), rows)


def of_layer(metrics: dict, layer: str) -> dict:
    """The metrics of one MoE layer, such as '03', by the rest of their names."""
    prefix = f"layers/{layer}/"
    return {n.removeprefix(prefix): x for n, x in metrics.items() if n.startswith(prefix)}


def bars(values: list[float]) -> str:
    """A row of bars, whose heights are the values relative to the largest one."""
    top = max(*values, 1e-9)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * value / top)] for value in values)


def perplexity(nats_per_token: float) -> float:
    return math.exp(min(nats_per_token, 700.0))
