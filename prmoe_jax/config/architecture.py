"""The placement schedule of the experts, its string form, and its stages."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

from prmoe_jax.errors import UserError

_TERM = r"[1-9]\d*(x[1-9]\d{0,3})?"  # a term of 'E=…': EXPERTS or EXPERTSxLAYERS


@dataclasses.dataclass(frozen=True)
class Stage:
    """`repeats` copies of a cell of consecutive layers; the model scans over the copies.

    `cell` holds the number of experts of each layer of the cell, 0 for a dense MLP.
    """

    cell: tuple[int, ...]
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
        """Makes a schedule; `experts` has one count per MoE layer of the placement, or one for all.

        Raises:
          UserError: the placement is unknown or has no MoE layer, or the counts do not fit it.
        """
        indices = moe_layers(layers, placement)
        if not indices:
            if experts or placement != "none":
                raise UserError(
                    f"experts={_counts(experts)} has no effect: placement '{placement}' puts no "
                    f"MoE layer into {layers} layers; use placement 'every 2', or no experts"
                )
            return cls((0,) * layers, top_k, residual)
        if len(experts) == 1:
            experts = tuple(experts) * len(indices)
        if len(experts) != len(indices):
            raise UserError(
                f"experts={_counts(experts)} has {len(experts)} entries, but placement "
                f"'{placement}' makes {len(indices)} MoE layers of {layers} layers; give "
                f"{len(indices)} entries, or one for all"
            )
        by_layer = dict(zip(indices, experts, strict=True))
        return cls(tuple(by_layer.get(i, 0) for i in range(layers)), top_k, residual)

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Reads '24 layers, E=32x10+64x2, residual'; the inverse of `str`.

        The parts are separated by commas: 'N layers'; a placement (default 'every 2'; see
        `moe_layers`); 'E=128', or one term 'EXPERTSxLAYERS' per run of equal MoE layers;
        'top 2'; 'residual'. Without an E the model is dense.

        Raises:
          UserError: a part is unknown, given twice, or contradicts another.
        """
        return cls.place(**parse_fields(text))

    def __str__(self) -> str:
        parts = [f"{len(self.experts)} layers"]
        indices = [i for i, count in enumerate(self.experts) if count]
        if indices:
            placement = _placement_name(len(self.experts), indices)
            if placement != "every 2":
                parts.append(placement)
            runs = _runs([count for count in self.experts if count])
            terms = [f"{count}x{repeats}" if repeats > 1 else str(count) for count, repeats in runs]
            parts.append(f"E={runs[0][0]}" if len(runs) == 1 else "E=" + "+".join(terms))
            if self.top_k > 1:
                parts.append(f"top {self.top_k}")
            if self.residual:
                parts.append("residual")
        return ", ".join(parts)

    def stages(self) -> tuple[Stage, ...]:
        """Cuts the layers into stages so that the fewest layers are compiled.

        Compile time grows with the sum of the cell lengths. Dynamic programming over the end of
        the first stage minimises this sum. Ties go to the fewest stages, then to the longest first
        stage, so that a student of 21 layers has the same cells as its teacher of 24.
        """
        n = len(self.experts)
        best: list[tuple[int, tuple[Stage, ...]]] = [(0, ())] * (n + 1)
        for start in reversed(range(n)):
            candidates = []
            for period in range(1, n - start + 1):
                cell, end = self.experts[start : start + period], start
                while self.experts[end : end + period] == cell:
                    end += period
                    cost, rest = best[end]
                    stage = Stage(cell, (end - start) // period)
                    candidates.append((period + cost, len(rest), -end, (stage, *rest)))
            cost, *_, stages = min(candidates, key=lambda c: c[:3])
            best[start] = cost, stages
        return best[0][1]


def moe_layers(layers: int, placement: str) -> tuple[int, ...]:
    """The 0-based indices of the MoE layers of a placement.

    Placements are 'none', 'every N' (the N-th, 2N-th, … layer), 'first half', 'second half'
    (every layer of that half), and 'layers 1 3 7'.

    Raises:
      UserError: the placement is none of these, or names a layer that does not exist.
    """
    half = layers // 2
    named = {
        "none": range(0),
        "first half": range(half),
        "second half": range(layers - half, layers),
    }
    if placement in named:
        return tuple(named[placement])
    if match := re.fullmatch(r"every (\d+)", placement):
        period = int(match[1])
        if not 1 <= period <= layers:
            raise UserError(
                f"placement '{placement}' makes no MoE layer in {layers} layers; use 'every N' "
                f"with N from 1 to {layers}"
            )
        return tuple(range(period - 1, layers, period))
    if re.fullmatch(r"layers \d+( \d+)*", placement):
        indices = [int(i) for i in placement.split()[1:]]
        if indices != sorted(set(indices)) or indices[-1] >= layers:
            raise UserError(
                f"placement '{placement}' must name ascending layers from 0 to {layers - 1}"
            )
        return tuple(indices)
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
    one_layer = False  # whether E=…x1 gives the experts of a single MoE layer
    fields: dict = {}

    def put(part, **values):
        for name, value in values.items():
            if name in fields:
                raise UserError(f"architecture '{text}': '{part}' gives the {name} a second time")
            fields[name] = value

    for part in (p.strip() for p in text.split(",")):
        if match := re.fullmatch(r"([1-9]\d*) layers", part):
            put(part, layers=int(match[1]))
        elif re.fullmatch(rf"E={_TERM}(\+{_TERM})*", part):
            counts: list[int] = []
            for term in part[2:].split("+"):
                count, _, repeats = term.partition("x")
                counts += [int(count)] * int(repeats or 1)
            one_layer = len(counts) == 1 and "x" in part
            put(part, experts=tuple(counts))
        elif match := re.fullmatch(r"top (\d+)", part):
            put(part, top_k=int(match[1]))
        elif part == "residual":
            put(part, residual=True)
        elif re.match(r"(every|first|second|layers|none)\b", part):
            put(part, placement=part)
        else:
            raise UserError(
                f"architecture '{text}': '{part}' is not understood; "
                "write for example '24 layers, E=32x10+64x2, residual'"
            )
    if "layers" not in fields:
        raise UserError(f"architecture '{text}' does not say how many layers; add '24 layers'")
    experts = fields.setdefault("experts", ())
    if experts:
        placement = fields.setdefault("placement", "every 2")
        if one_layer and (made := len(moe_layers(fields["layers"], placement))) > 1:
            raise UserError(
                f"architecture '{text}': E={experts[0]}x1 is for one MoE layer, and placement "
                f"'{placement}' makes {made}; write E={experts[0]} for all of them"
            )
    elif fields.keys() - {"layers", "experts"}:
        raise UserError(f"architecture '{text}' has no experts, so the rest has no effect; add E=…")
    return {"placement": "none", "top_k": 1, "residual": False} | fields


def _placement_name(layers: int, indices: list[int]) -> str:
    names = [f"every {n}" for n in range(1, layers + 1)] + ["first half", "second half"]
    matching = (name for name in names if moe_layers(layers, name) == tuple(indices))
    return next(matching, "layers " + " ".join(map(str, indices)))


def _runs(values: Sequence[int]) -> list[tuple[int, int]]:
    return [(value, len(list(run))) for value, run in itertools.groupby(values)]


def _counts(experts: Sequence[int]) -> str:
    return ",".join(map(str, experts)) or "()"
