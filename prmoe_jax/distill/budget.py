"""How many experts each layer of a pruned MoE keeps, and which."""

from collections.abc import Mapping

import numpy as np

from prmoe_jax.errors import UserError


def choose(
    importance: Mapping[int, np.ndarray],
    budget: float | tuple[int, ...],
    shape: str,
    least: int,
    prices: Mapping[int, np.ndarray] | None = None,
) -> dict[int, np.ndarray]:
    """The kept experts of each layer, ascending, by the layer's number, like the importance, [E].

    `budget` is the share of all experts to keep, or the number in each MoE layer, or one for all.
    For a share, `shape` is 'pyramid', 'uniform' (the same in every layer), 'inverse' (the pyramid's
    numbers in reverse order) or 'measured' (the least sum of `prices`, which are those of
    `importance.prices` in steps of `unit`). A layer keeps at least `least` experts.
    """
    order = ranked(importance)
    sizes = {layer: len(experts) for layer, experts in order.items()}
    if isinstance(budget, tuple):
        counts = _given(budget, sizes, least)
    else:
        counts = _shared(importance, order, budget, shape, least, prices)
    if counts == sizes:
        given = f"--keep={budget}" if isinstance(budget, float) else "--experts"
        raise UserError(f"{given} keeps all {sum(sizes.values())} experts; give less")
    return {layer: np.sort(experts[: counts[layer]]) for layer, experts in order.items()}


def ranked(importance: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The experts of each layer, the most important one first."""
    return {layer: np.argsort(-of_E, kind="stable") for layer, of_E in importance.items()}


def unit(importance: Mapping[int, np.ndarray]) -> int:
    """The number of experts that a share keeps or removes together.

    It is a power of two, so that meshes can split what stays: the largest up to an eighth of the
    smallest layer's experts.
    """
    return 1 << max(1, min(map(len, importance.values())) // 8).bit_length() - 1


def _given(budget: tuple[int, ...], sizes: Mapping[int, int], least: int) -> dict[int, int]:
    """The number of experts to keep in each layer, as a user gave it."""
    if len(budget) not in (1, len(sizes)):
        raise UserError(
            f"--experts={','.join(map(str, budget))} has {len(budget)} numbers, and the run has "
            f"{len(sizes)} MoE layers; give one for each, or one for all"
        )
    each = budget * len(sizes) if len(budget) == 1 else budget
    counts = dict(zip(sizes, each, strict=True))
    for layer, count in counts.items():
        if not least <= count <= sizes[layer]:
            raise UserError(
                f"--experts: layer {layer} cannot keep {count}; give from {least} (model.top_k) to "
                f"{sizes[layer]}, which it has"
            )
    return counts


def _shared(importance, order, keep: float, shape: str, least: int, prices) -> dict[int, int]:
    """The number of experts to keep in each layer, for a share `keep` of all experts.

    In a pyramid, the units beyond `least` are those that matter most in all layers together.
    """
    sizes, step = {layer: len(values) for layer, values in importance.items()}, unit(importance)
    total, smallest = sum(sizes.values()), min(sizes.values())
    units = {layer: size // step for layer, size in sizes.items()}
    wanted = min(round(keep * total / step), sum(units.values()))
    first = -(-least // step)
    needed = first * len(sizes)
    if needed * step >= total or first > min(units.values()):
        raise UserError(
            f"--keep={keep}: each layer needs {first * step} experts for model.top_k={least}, and "
            f"the smallest has {smallest}; --keep has nothing to cut here"
        )
    if wanted < needed:
        raise UserError(
            f"--keep={keep} leaves {wanted * step} experts for {len(sizes)} layers, and each needs "
            f"{first * step}; use {needed * step / total:.3g} or more"
        )
    if shape == "uniform":
        even = {layer: round(keep * size / step) for layer, size in sizes.items()}
        return {layer: step * max(first, min(units[layer], n)) for layer, n in even.items()}

    if shape == "measured":
        removed = _cheapest(prices, sum(units.values()) - wanted)
        return {layer: step * (units[layer] - n) for layer, n in removed.items()}

    def worth(layer: int, number: int) -> float:
        """The importance of a layer's unit of experts; number 0 is the best unit."""
        experts = order[layer][number * step : (number + 1) * step]
        return float(importance[layer][experts].sum())

    counts = dict.fromkeys(sizes, first)
    more = sorted((-worth(layer, n), layer) for layer in sizes for n in range(first, units[layer]))
    for _, layer in more[: wanted - needed]:
        counts[layer] += 1
    if shape == "inverse":
        counts = dict(zip(counts, reversed(counts.values()), strict=True))
        for layer, count in counts.items():
            if count * step > sizes[layer]:
                raise UserError(
                    f"--shape=inverse gives layer {layer} {count * step} experts, and it has "
                    f"{sizes[layer]}; use --shape=uniform to compare with"
                )
    return {layer: count * step for layer, count in counts.items()}


def _cheapest(prices: Mapping[int, np.ndarray], steps: int) -> dict[int, int]:
    """How many steps to take in each layer, `steps` in all, so that the prices' sum is least."""
    best: dict[int, tuple[float, dict[int, int]]] = {0: (0.0, {})}  # by the steps of some layers
    for layer, price in prices.items():
        ways = [
            (done + more, cost + price[more], taken | {layer: more})
            for done, (cost, taken) in best.items()
            for more in range(min(len(price), steps - done + 1))
        ]
        best = {done: (cost, taken) for done, cost, taken in sorted(ways, key=lambda way: -way[1])}
    return best[steps][1]
