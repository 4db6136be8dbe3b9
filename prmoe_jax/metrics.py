"""From sums to the numbers people read, and to the files that keep them."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from prmoe_jax.config import Config

# Dense bfloat16 peak of one device in FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def summarise(sums, config: Config) -> dict:
    """Means over tokens and layers from a `loss.Sums`; the per-layer ones under 'layers/NN/'.

    Returns:
      lm_loss (nats a token), z_loss, aux_loss (summed over the MoE layers), drop_fraction
      (choices lost to capacity), and for each MoE layer: aux_loss, drop_fraction,
      expert_load (share of choices, [E]), router_entropy (nats), residual_coefficient (mean
      weight of the experts' branch).
    """
    tokens = jnp.maximum(sums.tokens, 1)
    metrics = {"lm_loss": sums.lm_loss / tokens, "z_loss": sums.z_loss / tokens}
    aux_loss, dropped, assigned = jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
    moe_layers = [i for i, experts in enumerate(config.model.schedule.experts) if experts]
    for i, router in zip(moe_layers, sums.routers, strict=True):
        layer = f"layers/{i:02d}"
        routed = jnp.maximum(router.tokens, 1)
        choices = jnp.maximum(router.assigned_E.sum(), 1)
        layer_aux = router.aux_loss / jnp.maximum(router.groups, 1)
        metrics[f"{layer}/aux_loss"] = layer_aux
        metrics[f"{layer}/drop_fraction"] = router.dropped_E.sum() / choices
        metrics[f"{layer}/expert_load"] = router.assigned_E / choices
        metrics[f"{layer}/router_entropy"] = router.entropy / routed
        if config.model.residual:
            metrics[f"{layer}/residual_coefficient"] = router.coefficient / routed
        aux_loss += layer_aux
        dropped += router.dropped_E.sum()
        assigned += router.assigned_E.sum()
    metrics["aux_loss"] = aux_loss
    metrics["drop_fraction"] = dropped / jnp.maximum(assigned, 1)
    return metrics


def to_python(metrics: dict) -> dict:
    """Device arrays as plain numbers and lists; waits for the computation that makes them."""
    return {name: np.asarray(x).tolist() for name, x in jax.device_get(metrics).items()}


def model_flops_utilisation(flops_per_second: float) -> float | None:
    """Share of the devices' peak that model FLOPs reach; None where no peak is known."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return flops_per_second / (peak * jax.device_count()) if peak else None


class MetricsWriter:
    """Appends to metrics.jsonl, one line a step, and to TensorBoard; process 0 only."""

    def __init__(self, workdir: Path, resume_step: int):
        """Opens the files; what an interrupted run logged after `resume_step` is taken out.

        It will be logged again, equal to the last bit.
        """
        from tensorboardX import SummaryWriter

        self._path = workdir / "metrics.jsonl"
        kept = [json.dumps(m) + "\n" for m in read_metrics(self._path) if m["step"] <= resume_step]
        if self._path.exists():
            rewritten = self._path.with_suffix(".tmp")
            rewritten.write_text("".join(kept))
            rewritten.replace(self._path)
        self._file = self._path.open("a")
        self._tensorboard = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=resume_step + 1, write_to_disk=True
        )

    def write(self, step: int, metrics: dict) -> None:
        """Writes one line and flushes it."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line torn by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def perplexity(nats_per_token: float) -> float:
    return math.exp(min(nats_per_token, 700.0))
