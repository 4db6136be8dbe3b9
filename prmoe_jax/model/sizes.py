"""Counts parameters and FLOPs of a model, without JAX and without building it: `prmoe params`."""

import dataclasses
import runpy

from prmoe_jax.config.loading import resolve
from prmoe_jax.config.routers import capacity
from prmoe_jax.config.schema import ModelConfig, MoeConfig
from prmoe_jax.config.userfile import shipped
from prmoe_jax.tables import aligned


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One layer's experts, parameters, active parameters and forward FLOPs per token."""

    experts: int
    params: int
    active_params: int
    forward_flops: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """A model's size and compute; `layers` are first to last, without embedding and logits.

    Active parameters are those that a token uses: all but the experts that it is not routed to.
    Where experts choose tokens, the number of experts per token is the mean.
    FLOPs are those of the matrix products, 2 per multiply-add. In attention, each query counts with
    all tokens of the context, as in PaLM (arXiv 2204.02311, appendix B), or of the sliding window.
    """

    layers: tuple[LayerCost, ...]
    embedding_params: int
    logits_flops: int

    @property
    def total_params(self) -> int:
        return self.embedding_params + sum(layer.params for layer in self.layers)

    @property
    def active_params(self) -> int:
        return self.embedding_params + sum(layer.active_params for layer in self.layers)

    @property
    def train_flops_per_token(self) -> int:
        """Forward and backward FLOPs; a backward pass costs two forward passes."""
        return 3 * (self.logits_flops + sum(layer.forward_flops for layer in self.layers))


def cost(model: ModelConfig, moe: MoeConfig | None = None) -> Cost:
    """Counts a model, with shared experts (residual MLPs) and routers.

    `moe` says how it routes; without it, tokens choose `top_k` experts.
    """
    d = model.d_model
    heads, pairs = model.heads * model.head_width, model.key_heads * model.head_width
    every = model.biases == "every"
    biased = every or model.biases == "all"
    norm = (2 if model.norm == "layernorm" else 1) * d
    attention = 2 * d * (heads + pairs)
    flops = 2 * attention  # without scores and their sums of values
    attention += (heads + 2 * pairs) * (model.biases != "none") + d * biased
    attention += model.heads * (model.attention_sinks == "learned")
    attention += {"none": 0, "head": 2 * model.head_width, "whole": heads + pairs}[model.qk_norm]
    matrices = 3 if model.gated else 2

    def mlp(width: int) -> int:
        units = biased + (every and model.gated)  # biases of a hidden unit
        return matrices * d * width + units * width + d * biased

    def visits(experts: int) -> float:
        """The mean number of experts per token."""
        if moe is None or moe.routes.tokens_choose:
            return model.top_k
        tokens = moe.group_size or model.length
        factor, least = moe.capacity_factor, moe.min_capacity
        return experts * capacity(tokens, experts, factor, model.top_k, least) / tokens

    def layer(experts: int, window: int) -> LayerCost:
        seen = min(window or model.length, model.length)
        columns = experts  # of the router, and of the residual's mix
        width = 0 if experts else model.d_ff  # of the MLP that every token visits
        params = 2 * norm + attention
        if experts and moe is not None and moe.bias_update_rate > 0:
            params += experts
        params += experts * every  # the router's biases
        if experts and model.residual:
            width = model.residual_width
            columns += {"learned": 2, "sigmoid": 1}.get(model.residual_mix, 0)
            params += 2 * (model.residual_mix == "learned")
        params += columns * d + (mlp(width) if width else 0)
        shared_flops = flops + 4 * seen * heads + 2 * columns * d + 2 * matrices * d * width
        expert = mlp(model.expert_width)
        visited = min(visits(experts), experts) if experts else 0
        return LayerCost(
            experts,
            params + experts * expert,
            params + round(visited * expert),
            shared_flops + round(visited * 2 * matrices * d * model.expert_width),
        )

    positions = model.length if model.positions == "learned" else 0
    tables = 1 if model.output == "tied" else 2
    return Cost(
        layers=tuple(map(layer, model.schedule.experts, model.windows)),
        embedding_params=(tables * model.vocab_size + positions) * d + norm,
        logits_flops=2 * d * model.vocab_size,
    )


def report(model: ModelConfig, moe: MoeConfig | None = None) -> dict:
    """A model's parameters, active parameters and training FLOPs per token: total and by layer."""
    counted = cost(model, moe)
    return {
        "architecture": str(model.schedule),
        "total_params": counted.total_params,
        "active_params": counted.active_params,
        "train_flops_per_token": counted.train_flops_per_token,
        "embedding_params": counted.embedding_params,
        "layers": [
            {
                "layer": i,
                "kind": "moe" if layer.experts else "dense",
                "experts": layer.experts,
                "params": layer.params,
                "active_params": layer.active_params,
                "train_flops_per_token": 3 * layer.forward_flops,
            }
            for i, layer in enumerate(counted.layers)
        ],
    }


def table(model: ModelConfig, moe: MoeConfig | None = None) -> str:
    """The counts of `report` as a table in text."""
    counted = cost(model, moe)
    embedding, flops = counted.embedding_params, counted.train_flops_per_token
    rows: list[tuple] = [("embedding", "", embedding, embedding, 3 * counted.logits_flops)]
    for i, layer in enumerate(counted.layers):
        numbers = layer.params, layer.active_params, 3 * layer.forward_flops
        rows.append((i, layer.experts or "dense", *numbers))
    rows.append(("total", "", counted.total_params, counted.active_params, flops))
    cells = [(*row[:2], *(f"{number:,}" for number in row[2:])) for row in rows]
    return (
        f"{model.schedule}; d_model {model.d_model}, d_ff {model.d_ff}, heads {model.heads}, "
        f"context {model.length}, vocabulary {model.vocab_size}\n\n"
        + aligned(("layer", "experts", "params", "active", "train FLOPs/token"), cells)
    )


def paper_rows() -> list[dict]:
    """The counts of the paper's nine models, each with the parameters that the paper states."""
    paper = runpy.run_path(str(shipped("paper")))
    rows = []
    for name, row in paper["ROWS"].items():
        counts = report(resolve(paper["get_config"](name)).model)
        del counts["embedding_params"], counts["layers"]
        rows.append({"name": name, **counts, "paper_params": row.params * 1e9})
    return rows


def paper_table(rows: list[dict]) -> str:
    """`paper_rows` as a table in text."""
    head = "name", "total", "paper", "active", "train FLOPs/token", "architecture"
    cells = [
        (
            row["name"],
            f"{row['total_params'] / 1e9:.2f}B",
            f"{row['paper_params'] / 1e9:g}B",
            f"{row['active_params'] / 1e9:.3f}B",
            f"{row['train_flops_per_token'] / 1e9:.2f}G",
            row["architecture"],
        )
        for row in rows
    ]
    return aligned(head, cells, texts=(0, 5))
