"""The placement schedule of the experts, its string form, and its stages."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

from prmoe_jax.errors import UserError

_TERM = r"[1-9]\d*(x[1-9]\d{0,3})?"  # a term of 'E=…': EXPERTS or EXPERTSxLAYERS


@dataclasses.dataclass(frozen=True)
class Layer:
    """What differs between a model's layers."""

    experts: int  # 0 for a dense MLP
    window: int  # tokens that a token attends to, itself included; 0 is all before it


@dataclasses.dataclass(frozen=True)
class Stage:
    """`repeats` copies of a cell of consecutive layers; the model scans over the copies."""

    cell: tuple[Layer, ...]
    repeats: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The feed-forward network of every layer, from first to last.

    `experts` has one entry per layer: the number of experts of its MoE, 0 for a dense MLP.
    Each token is routed to `top_k` experts. `residual` adds an MLP that all tokens pass, known as a
    shared expert (paper, section 4.1.2).
    """

    experts: tuple[int, ...]
    top_k: int = 1
    residual: bool = False

    @classmethod
    def place(
        cls, layers: int, placement: str, experts: Sequence[int], top_k: int = 1, residual=False
    ) -> "Schedule":
        """Makes a schedule; `experts` has a count for each MoE layer, or one for all."""
        indices = placed(layers, placement)
        given = f"experts={','.join(map(str, experts)) or '()'}"
        if not indices and (experts or placement != "none"):
            raise UserError(
                f"{given} has no effect: placement '{placement}' puts no MoE layer into {layers} "
                "layers; use placement 'every 2', or no experts"
            )
        if len(experts) == 1:
            experts = tuple(experts) * len(indices)
        if len(experts) != len(indices):
            raise UserError(
                f"{given} has {len(experts)} entries, but placement '{placement}' makes "
                f"{len(indices)} MoE layers of {layers} layers; give {len(indices)} entries, or "
                "one for all"
            )
        by_layer = dict(zip(indices, experts, strict=True))
        return cls(tuple(by_layer.get(i, 0) for i in range(layers)), top_k, residual)

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Reads '24 layers, E=32x10+64x2, residual'; the inverse of `str`.

        The parts are separated by commas: 'N layers'; a placement (default 'every 2'; see
        `placed`); 'E=128', or one term 'EXPERTSxLAYERS' per run of equal MoE layers;
        'top 2'; 'residual'. Without an E the model is dense.
        """
        return cls.place(**parse_fields(text))

    def __str__(self) -> str:
        layers = f"{len(self.experts)} layers"
        counts = list(filter(None, self.experts))
        if not counts:
            return layers
        runs = [(count, len(list(run))) for count, run in itertools.groupby(counts)]
        terms = [f"{count}x{repeats}" if repeats > 1 else str(count) for count, repeats in runs]
        indices = [i for i, count in enumerate(self.experts) if count]
        placement = placement_of(indices, len(self.experts))
        parts = [
            layers,
            placement if placement != "every 2" else "",
            f"E={counts[0]}" if len(runs) == 1 else "E=" + "+".join(terms),
            f"top {self.top_k}" if self.top_k > 1 else "",
            "residual" if self.residual else "",
        ]
        return ", ".join(filter(None, parts))


def stages(layers: Sequence[Layer]) -> tuple[Stage, ...]:
    """Cuts the layers into stages so that the fewest layers are compiled.

    Compile time grows with the sum of the cell lengths. Dynamic programming over the end of the
    first stage minimises this sum. Ties go to the fewest stages, then to the longest first stage,
    so that a student of 21 layers has the same cells as its teacher of 24.
    """
    n = len(layers)
    best: list[tuple[int, tuple[Stage, ...]]] = [(0, ())] * (n + 1)
    for start in reversed(range(n)):
        candidates = []
        for period in range(1, n - start + 1):
            cell, end = tuple(layers[start : start + period]), start
            while tuple(layers[end : end + period]) == cell:
                end += period
                cost, rest = best[end]
                stage = Stage(cell, (end - start) // period)
                candidates.append((period + cost, len(rest), -end, (stage, *rest)))
        cost, *_, found = min(candidates, key=lambda c: c[:3])
        best[start] = cost, found
    return best[0][1]


def placement_of(indices: Sequence[int], layers: int) -> str:
    """The placement with these layers, by its shortest name."""
    if not indices:
        return "none"
    names = [f"every {n}" for n in range(1, layers + 1)] + ["first half", "second half"]
    matching = (name for name in names if placed(layers, name) == tuple(indices))
    return next(matching, "layers " + " ".join(map(str, indices)))


def placed(layers: int, placement: str) -> tuple[int, ...]:
    """The 0-based indices of the layers of a placement.

    Placements are 'none', 'every N' (the N-th, 2N-th, … layer), 'first half', 'second half'
    (every layer of that half), and 'layers 1 3 7'.
    """
    match placement.split(" "):
        case ["none"]:
            return ()
        case ["first", "half"]:
            return tuple(range(layers // 2))
        case ["second", "half"]:
            return tuple(range(layers - layers // 2, layers))
        case ["every", period] if period.isdecimal():
            if not 1 <= int(period) <= layers:
                raise UserError(
                    f"placement '{placement}' names none of {layers} layers; use 'every N' with N "
                    f"from 1 to {layers}"
                )
            return tuple(range(int(period) - 1, layers, int(period)))
        case ["layers", *names] if names and all(map(str.isdecimal, names)):
            indices = tuple(map(int, names))
            if indices != tuple(sorted(set(indices))) or indices[-1] >= layers:
                raise UserError(
                    f"placement '{placement}' must name ascending layers from 0 to {layers - 1}"
                )
            return indices
    raise UserError(
        f"placement '{placement}' is unknown; use 'none', 'every 2', 'first half', "
        "'second half' or 'layers 1 3 5'"
    )


def parse_fields(text: str) -> dict:
    """Parses an architecture string into the arguments of `Schedule.place`.

    The result has every argument, so that `config.model.update(parse_fields(text))` replaces the
    whole architecture of a config.

    Raises:
      UserError: a part is unknown, given twice, or missing.
    """
    fields: dict = {}
    one_layer = False  # whether E=…x1 gives the experts of a single MoE layer
    for part in map(str.strip, text.split(",")):
        if match := re.fullmatch(r"([1-9]\d*) layers", part):
            field: dict = {"layers": int(match[1])}
        elif re.fullmatch(rf"E={_TERM}(\+{_TERM})*", part):
            terms = [term.partition("x") for term in part[2:].split("+")]
            counts = [[int(count)] * int(repeats or 1) for count, _, repeats in terms]
            field = {"experts": tuple(itertools.chain(*counts))}
            one_layer = "x" in part and len(field["experts"]) == 1
        elif match := re.fullmatch(r"top (\d+)", part):
            field = {"top_k": int(match[1])}
        elif part == "residual":
            field = {"residual": True}
        elif re.match(r"(every|first|second|layers|none)\b", part):
            field = {"placement": part}
        else:
            raise UserError(
                f"architecture '{text}': '{part}' is not understood; "
                "write for example '24 layers, E=32x10+64x2, residual'"
            )
        if twice := fields.keys() & field:
            raise UserError(
                f"architecture '{text}': '{part}' gives the {twice.pop()} a second time"
            )
        fields |= field
    if "layers" not in fields:
        raise UserError(f"architecture '{text}' does not say how many layers; add '24 layers'")
    experts = fields.setdefault("experts", ())
    if experts:
        placement = fields.setdefault("placement", "every 2")
        if one_layer and (made := len(placed(fields["layers"], placement))) > 1:
            raise UserError(
                f"architecture '{text}': E={experts[0]}x1 is for one MoE layer, and placement "
                f"'{placement}' makes {made}; write E={experts[0]} for all of them"
            )
    elif fields.keys() - {"layers", "experts"}:
        raise UserError(f"architecture '{text}' has no experts, so the rest has no effect; add E=…")
    return {"placement": "none", "top_k": 1, "residual": False} | fields
