"""Facts about each router that the settings need; `moe/routing.py` computes the routing."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Router:
    """The facts about a value of `moe.router`."""

    # Whether each token chooses `model.top_k` experts. If not, the experts choose tokens: a token's
    # number of experts varies, and the model needs an expert capacity in inference, too.
    tokens_choose: bool
    causal: bool  # whether a token's experts don't depend on the tokens after it
    ignores: tuple[str, ...] = ()  # settings that it does not read


ROUTERS = {
    "token_choice": Router(tokens_choose=True, causal=True),
    "expert_choice": Router(
        tokens_choose=False,
        causal=False,
        # No expert overflows, the load is even, and weights are the scores.
        ignores=(
            *("moe.overflow", "moe.balance", "moe.bias_update_rate", "moe.aux_loss_weight"),
            *("moe.routed_scale", "moe.second_expert_sampling"),
        ),
    ),
}


def capacity(tokens: int, experts: int, capacity_factor: float, top_k: int, minimum: int) -> int:
    """Slots of an expert for a group of `tokens`: max(ceil(S/E · factor · k), minimum).

    As in DeepSpeed, the product is a float32, so that 25 · 1.2 makes 31 slots. The result never
    exceeds S, since a token chooses an expert at most once. An infinite factor gives S.
    """
    if math.isinf(capacity_factor):
        return tokens
    slots = math.ceil(np.float32(tokens / experts) * np.float32(capacity_factor * top_k))
    return min(max(slots, minimum), tokens)
