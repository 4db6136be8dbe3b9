"""Reports: statistics by hand, figures that are the same each time, pages that need no network."""

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from prmoe_jax.cli import main
from prmoe_jax.config.loading import load, resolve, save
from prmoe_jax.report import figures
from prmoe_jax.report.arms import (
    Mean,
    arms,
    difference,
    mean,
    spread,
    with_documents,
    write_csv,
)
from prmoe_jax.sweep.records import record as recorded
from tests.support.faults import file_size_limit
from tests.support.lines import only_line
from tests.support.records import record
from tests.support.runs import arguments

# Of three arms, the last with a seed of its own.
LOSSES = {"one": {1: 3.0, 2: 3.2, 3: 3.1}, "two": {1: 2.9, 2: 3.0, 3: 2.8}, "<b>": {4: 2.0}}


@pytest.fixture
def folder(tmp_path):
    rows = [record(arm, seed, loss) for arm, by in LOSSES.items() for seed, loss in by.items()]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_statistics_by_hand():
    """Means of three, Student's t of 2 degrees of freedom; differences seed by seed."""
    found = arms([record(a, s, x) for a, by in LOSSES.items() for s, x in by.items()])
    assert list(found) == list(LOSSES)
    assert mean([3.0, 3.2, 3.1]) == pytest.approx((3.1, 4.302653 * 0.1 / 3**0.5), rel=1e-6)
    apart = difference(found["two"], found["one"])  # -0.1, -0.2, -0.3
    margin = 4.302653 * 0.1 / 3**0.5
    assert (apart.value, apart.margin) == pytest.approx((-0.2, margin), rel=1e-6)
    assert str(apart) == "-0.2000 ± 0.2484"
    assert difference(found["<b>"], found["one"]) is None
    assert str(Mean(*mean([2.0]))) == "2.0000"


def blocks(losses_AxS, missing=()):
    """Records by arm and seed, without those of some places."""
    return {
        arm: {s: {"loss": x} for s, x in enumerate(row) if (arm, s) not in missing}
        for arm, row in enumerate(losses_AxS)
    }


def test_the_spread_of_all_arms_by_hand():
    """Residuals of arm and seed; three arms and three seeds leave 4 degrees of freedom."""
    # Arms at 3.0, 3.1, 3.2 and seeds at 0, 0.1, 0.2, and a table whose rows and columns add up
    # to 0: the sum of squares is 6 * 0.01².
    noise = 0.01 * np.array([[1, -1, 0], [-1, 0, 1], [0, 1, -1]])
    losses = 3.0 + 0.1 * np.arange(3)[:, None] + 0.1 * np.arange(3) + noise
    found = spread(blocks(losses))
    assert found == pytest.approx(((6 * 0.01**2 / 4) ** 0.5, 4))
    one, two = blocks(losses)[0], blocks(losses)[1]
    # t of 4 degrees of freedom is 2.776, and 2.132 at 5 % on one side.
    apart = difference(two, one, pooled=found)
    half = 0.01 * (1.5 * 2 / 3) ** 0.5
    assert (apart.value, apart.margin) == pytest.approx((0.1, 2.776445 * half), rel=1e-6)
    assert apart.verdict(0.1 + 2.14 * half) == "equivalent"
    assert apart.verdict(0.1 + 2.12 * half) == "worse"
    # An arm with one seed, and a seed of one arm, tell nothing about the others.
    more = blocks(losses) | {3: {0: {"loss": 9.0}}}
    more[0][7] = {"loss": 5.0}
    assert spread(more) == pytest.approx(found)
    # With two arms it is the spread of the pairs.
    pairs = blocks(losses[:2])
    assert difference(two, one, pooled=spread(pairs)) == pytest.approx(difference(two, one))
    assert spread(blocks(losses[:1])) is None


@pytest.mark.parametrize("missing", [(), ((0, 1), (4, 2))])
def test_pooled_intervals_hold_what_they_promise(missing):
    """95 % of them have the difference; a difference of the margin is equivalent in 5 %."""
    rng, trials, margin = np.random.default_rng(0), 4000, 0.02
    inside = equivalent = 0
    for _ in range(trials):
        losses = rng.normal(0, 0.1, (1, 3)) + rng.normal(0, 0.01, (6, 3))
        losses[0] += margin
        found = blocks(losses, missing)
        pooled = spread(found)
        apart = difference(found[0], found[1], pooled=pooled)
        inside += abs(apart.value - margin) < apart.margin
        equivalent += apart.verdict(margin) == "equivalent"
    assert inside / trials == pytest.approx(0.95, abs=0.012)
    assert equivalent / trials == pytest.approx(0.05, abs=0.012)


def test_a_sweep_that_pools(folder, capsys):
    """Its differences have the margins of the common spread, on the page, too."""
    (folder / "sweep.py").write_text("POOLED = True\nMARGIN = 0.3\n")
    assert main(["report", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pooled = spread({arm: {s: {"loss": x} for s, x in by.items()} for arm, by in LOSSES.items()})
    assert (found["deviation"], found["freedom"]) == pytest.approx(pooled)
    margin = 4.302653 * pooled.deviation * (2 / 3) ** 0.5
    assert found["arms"]["two"]["difference_margin"] == pytest.approx(margin, rel=1e-6)
    assert main(["report", str(folder)]) == 0
    told = f"all arms: a standard deviation of {pooled.deviation:.4f} nats, 2 degrees of freedom"
    assert told in capsys.readouterr().out
    assert (
        f"deviation is {pooled.deviation:.4f} nats (2 degrees"
        in (folder / "report.html").read_text()
    )


def documented(nats_SxN, targets_N):
    """Records by seed with these losses of documents."""
    return {
        seed: {"loss": sum(nats) / sum(targets_N),
               "documents": [list(pair) for pair in zip(nats, targets_N, strict=True)]}
        for seed, nats in enumerate(nats_SxN)
    }  # fmt: skip


@pytest.mark.parametrize(("of_seed", "of_document"), [(0.01, 0.0), (0.003, 0.15), (0.0005, 0.15)])
def test_an_interval_of_seeds_and_documents_holds_what_it_promises(of_seed, of_document):
    """Near 95 % have the true difference, where the interval of seeds alone may have few."""
    rng, trials, both, seeds_alone = np.random.default_rng(1), 300, 0, 0
    for _ in range(trials):
        targets = rng.integers(50, 500, 60)
        each = rng.normal(0, of_seed, (3, 1)) + rng.normal(0, of_document, 60) + 0.02
        base = documented(np.tile(3.0 * targets, (3, 1)), targets)
        arm = documented((3.0 + each) * targets, targets)
        apart = difference(arm, base)
        low, high = with_documents(arm, base, apart)
        both += low < 0.02 < high
        seeds_alone += abs(apart.value - 0.02) < apart.margin
    assert 0.90 < both / trials < 0.995
    assert seeds_alone < both or not of_document


def test_no_interval_without_the_same_documents():
    one = documented([[30.0, 40.0], [31.0, 40.0]], [10, 20])
    two = documented([[33.0, 40.0], [34.0, 40.0]], [10, 20])
    apart = difference(two, one)
    low, high = with_documents(two, one, apart)  # documents at 0.3 and 0.0, all seeds alike
    assert (low, high) == pytest.approx((0.0, 0.3), abs=1e-9)
    assert with_documents(two, one, apart) == (low, high)
    other = documented([[33.0, 40.0], [34.0, 40.0]], [11, 19])
    assert with_documents(other, one, apart) is None
    del two[1]["documents"]
    assert with_documents(two, one, apart) is None


def test_a_sweep_with_documents(folder, capsys):
    """Its comparisons have a column more; without documents they are as they were."""
    (folder / "sweep.py").write_text('CONTRASTS = (("two", "one"),)')
    assert main(["report", str(folder)]) == 0
    assert "seeds and documents" not in capsys.readouterr().out
    before = (folder / "report.html").read_text()
    rows = list(map(json.loads, (folder / "results.jsonl").read_text().splitlines()))
    for row in rows:
        row["documents"] = [[10 * row["loss"], 10], [20 * row["loss"] + row["seed"], 20]]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(folder)]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^arm +base +arm - base +seeds and documents +p, Holm", told, re.M)
    assert re.search(r"^two +one +-0.2000 ± 0.2484 +-0\.\d+ to -?0\.\d+ ", told, re.M)
    after = (folder / "report.html").read_text()
    assert "resamples both" in after and "resamples both" not in before
    assert "seeds and documents" not in before


def test_report_of_a_sweep(folder, capsys):
    """The table, what is in the files, and the same bytes again."""
    assert main(["report", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["arms"]
    assert found["two"]["difference"] == pytest.approx(-0.2)
    assert found["<b>"] == {"seeds": 1, "tokens": 2000, "loss": 2.0}
    lines = list(csv.DictReader((folder / "results.csv").open()))
    assert [line["run"] for line in lines] == ["one/1", "one/2", "one/3", "two/1", "two/2",
                                               "two/3", "<b>/4"]  # fmt: skip
    assert lines[3]["loss"] == "2.9" and lines[0]["seed"] == "1"
    assert "model.layers" not in lines[0]  # all the same
    head = (folder / "results.csv").read_text().splitlines()[0].split(",")
    assert len(set(head)) == len(head)
    names = {f"{name}.{kind}" for name in ("loss_tokens", "loss_flops", "loss_parameters",
             "differences", "drops") for kind in ("png", "svg")}  # fmt: skip
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert made.keys() == names | {"results.csv", "results.jsonl", "report.html"}
    html = made["report.html"].decode()
    assert "<td>3.1000 ± 0.2484</td>" in html and "<td>-0.2000 ± 0.2484</td>" in html
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert html.count("data:image/svg+xml;base64,") == 5
    assert not re.search(r"https?:|src=\"(?!data:)|<script|<link", html)
    assert main(["report", str(folder)]) == 0
    assert re.search(r"^two +3 +2.9000 ± 0.2484 +-0.2000 ± 0.2484$", capsys.readouterr().out, re.M)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made
    assert main(["report", str(folder), "--base=two"]) == 0
    out = capsys.readouterr().out
    assert "above two" in out
    assert re.search(r"^one +3 +3.1000 ± 0.2484 +\+0.2000 ± 0.2484$", out, re.M)
    assert main(["report", str(folder), "--base="]) == 2
    assert "no arm ''; --base is one of one, two, <b>" in capsys.readouterr().err
    assert main(["report", str(folder), "--base=three"]) == 2
    assert "no arm 'three'; --base is one of one, two, <b>" in capsys.readouterr().err


def test_report_of_a_run(text, tmp_path, capsys):
    """What a run logged, drawn by layer."""
    run = tmp_path / "run"
    assert (
        main(
            arguments(
                text, run, "4 layers, E=4+8, residual", **{"eval.every": 4, "eval.batches": 2}
            )
        )
        == 0
    )
    trained = json.loads(capsys.readouterr().out)
    assert main(["report", f"--workdir={run}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 12 and found["validation_loss"] == trained["eval/loss"]
    html = Path(found["page"]).read_text()
    figures = {path.stem for path in (run / "report").glob("*.svg")}
    assert figures == {"loss", "speed", "drop_fraction", "router_entropy", "residual_coefficient",
                       "fullest_expert", "router_weight", "added_norm",
                       "expert_load", "expert_drop_fraction"}  # fmt: skip
    assert html.count("<figure>") == len(figures)
    assert "<td>model.experts</td><td>(4, 8)</td>" in html
    # The evaluations of two batches are joined; that of the whole split is apart, as its record is.
    svg = (run / "report" / "loss.svg").read_text()
    assert "<!-- validation, whole split -->" in svg
    part, again, whole = recorded("prmoe/0", load(run / "config.json"), run)["evaluated_tokens"]
    assert part == again < whole and f"<!-- validation, {part:,} tokens -->" in svg
    assert f"<td>tokens of the validation split</td><td>{whole:,}</td>" in html
    layers = recorded("prmoe/0", load(run / "config.json"), run)["layers"]
    assert list(layers) == ["01", "03"]
    assert len(layers["03"]["position_drop_fraction"]) == 16


def test_settings_that_may_change_on_resuming_keep_an_arm_together(tmp_path, capsys):
    """Older records have some of them; the sweep takes such a run for recorded, too."""
    rows = [record("moe", seed, 3.0) for seed in (1, 2)]
    rows[0]["settings"]["train.accumulate"] = 2
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(tmp_path), "--json"]) == 0
    capsys.readouterr()
    rows[0]["settings"]["model.d_ff"] = 7
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(tmp_path)]) == 2
    assert "differ in model.d_ff;" in only_line(capsys.readouterr().err)


def test_drops_in_groups_of_several_sizes(drawn):
    """A group of 4 tokens has 4 places, those of 16 and more have 16."""
    large, small = (record("moe", seed, 3.0) for seed in (1, 2))
    large["layers"]["01"] = {"position_drop_fraction": [i / 16 for i in range(16)]}
    small["layers"]["01"] = {"position_drop_fraction": [0.2, 0.2, 0.2, 0.2]}
    figures.drops({"moe": {1: large, 2: small}}, Path())
    (line,) = drawn.pop().lines
    np.testing.assert_allclose(line.get_ydata(), [(i / 16 + 0.2) / 2 for i in range(16)])


@pytest.mark.parametrize("steps", [[3], [3, 5], [3, 5, 7]])
def test_every_step_of_a_map_has_a_width(steps, drawn):
    figures.heat({"1": np.ones((len(steps), 4))}, steps, "load", Path())
    (mesh,) = drawn.pop().collections
    assert (np.diff(mesh.get_coordinates()[0, :, 0]) > 0).all()


def shown(line):
    """A drawn line's points, and what marks and joins them."""
    return line.get_xydata().tolist(), line.get_marker(), line.get_linestyle()


def test_a_curve_joins_evaluations_of_one_kind(drawn):
    """Of 80 and 80 and, at the end, all 700 tokens of the validation split; means of two seeds."""
    rows = {
        seed: record(
            "one", seed, 2.5, flops_per_token=3,
            evaluations=[[10, 5.0 + seed], [20, 4.0 + seed], [30, 4.5 + seed]],
            evaluated_tokens=counts,
        )
        for seed, counts in ((1, [80, 80, 700]), (2, [80, 80, 700]))
    }  # fmt: skip
    assert figures.curves({"one": rows}, Path(), by_flops=False)
    last, joined, legend = drawn.pop().lines
    assert shown(joined) == ([[10, 6.5], [20, 5.5]], "o", "-")
    assert shown(last) == ([[30, 6.0]], "o", "None") and last.get_markerfacecolor() == "none"
    assert (joined.get_label(), legend.get_label()) == ("one", "whole split")
    # The same of old records, which do not have the counts.
    for row in rows.values():
        del row["evaluated_tokens"]
    assert figures.curves({"one": rows}, Path(), by_flops=True)
    last, joined, _ = drawn.pop().lines
    assert shown(joined) == ([[30, 6.5], [60, 5.5]], "o", "-")
    # All of the whole split: one line. A seed that was evaluated less often is no reason to fail.
    for row in rows.values():
        row["evaluated_tokens"] = [700, 700, 700]
    rows[2]["evaluations"], rows[2]["evaluated_tokens"] = [[20, 6.0], [30, 6.5]], [700, 700]
    assert not figures.curves({"one": rows}, Path(), by_flops=False)
    (joined,) = drawn.pop().lines
    assert shown(joined) == ([[20, 5.5], [30, 6.0]], "o", "-")


@pytest.mark.filterwarnings("error")
def test_many_arms_leave_room_for_their_curves(tmp_path):
    """Their legend is below the axes, and no two look alike."""
    rows = {f"arm_{i}": {1: record(f"arm_{i}", 1, 3.0 + i)} for i in range(18)}
    with figures.figure(tmp_path / "few.png") as few:
        few.plot([1, 2], label="a")
        figures._legend(few)
    figures.curves(rows, tmp_path / "many.png", by_flops=False)
    sizes = [imread(tmp_path / f"{name}.png").shape for name in ("few", "many")]
    assert sizes[1][0] > 1.2 * sizes[0][0] and sizes[1][1] == sizes[0][1]
    styles = {tuple(figures._style(i).values()) for i in range(64)}
    assert len(styles) == 64


def plain(label):
    """What a reader sees of a label."""
    return label.get_text().replace("\\$", "$").removeprefix(" ")


def test_names_are_shown_as_they_are(folder, drawn):
    """Whatever they would mean to matplotlib: hidden from legends, mathematics, a style."""
    names = ["_x", "$x", "$x$", "$\\frac{$", "a_b^", "\\alpha", "50%", "{}", "__", "\\$x$"]
    found = arms([record(name, 1, 2.0, run=f"{name}/1") for name in names])
    assert list(found) == names
    figures.curves(found, Path(), by_flops=False)
    figures.sizes(found, Path())
    figures.drops(found, Path())
    figures.lines({name: ([1, 2], [3.0, 4.0]) for name in names}, "nats", Path())
    figures.differences(dict.fromkeys(names, Mean(0.1, 0.2)), "$x_$", Path())
    for axes in drawn:
        axes.figure.savefig(io.BytesIO())  # where bad mathematics raises
    *legends, ticks = drawn
    for axes in legends:
        legend = axes.get_legend() or axes.figure.legends[0]
        assert list(map(plain, legend.get_texts()))[: len(names)] == names
    assert list(map(plain, ticks.get_yticklabels())) == names
    assert figures.label("a") == "a"


def test_no_cell_is_a_formula(tmp_path):
    """Text that a spreadsheet would compute has an apostrophe before it; numbers stay numbers."""
    odd = ["=1+1", "+1", "-1", "@a", "\t=1", "\r=1", "a=1", "1-1"]
    rows = [
        record(name, -3, -2.5, run=f"{name}/1", settings={"a": name, "b": -i, "=c": [-i]})
        for i, name in enumerate(odd)
    ]
    write_csv(rows, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    safe = ["'=1+1", "'+1", "'-1", "'@a", "'\t=1", "'\n=1", "a=1", "1-1"]
    assert [row["run"] for row in found] == [f"{name}/1" for name in safe]
    assert [row["a"] for row in found] == safe
    assert [row["b"] for row in found] == [f"{-i}" for i in range(len(odd))]
    assert found[1]["'=c"] == "[-1]"
    assert {(row["loss"], row["seed"]) for row in found} == {("-2.5", "-3")}


def test_a_full_disk_leaves_the_old_report(folder, capsys):
    """Each file is the old one or the new one; one line says which cannot be written."""
    assert main(["report", str(folder)]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    lines = (folder / "results.jsonl").read_text().splitlines()
    (folder / "results.jsonl").write_text("\n".join(lines[:-2]) + "\n")  # other figures
    capsys.readouterr()
    with file_size_limit(1000):
        assert main(["report", str(folder)]) == 2
    line = only_line(capsys.readouterr().err)
    assert f"{folder}/loss_tokens.svg cannot be written: File too large" in line
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {
        "results.jsonl", "results.csv",
    }  # fmt: skip


def test_a_report_shows_all_records(folder, drawn, capsys):
    """Whatever sweep.py names today, which is not run."""
    (folder / "sweep.py").write_text("raise SystemExit")
    assert main(["report", str(folder), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["arms"]) == list(LOSSES)


def damaged(**changes):
    """A folder's preparation: a record with other values, or without where they are None."""

    def change(folder):
        row = record("a", 1, 2.0) | changes
        row = {name: value for name, value in row.items() if value is not None}
        (folder / "results.jsonl").write_text(json.dumps(row) + "\n")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "results.jsonl").unlink(), "results.jsonl is missing; prmoe sweep"),
        (lambda f: (f / "results.jsonl").write_text('{"a": 1}\n'), "holds no runs of prmoe sweep"),
        (
            lambda f: (f / "results.jsonl").write_text(
                json.dumps(record("a", 1, 2.0)) + "\n"
                + json.dumps(record("a", 2, 2.0, settings={"seed": 2})) + "\n"
            ),
            "a/1 and a/2 are of one arm, but differ in model.layers; train one of them again, give",
        ),
        (
            lambda f: (
                (f / "sweep.py").write_text("POOLED = True"),
                (f / "results.jsonl").write_text(
                    "".join(json.dumps(record(f"a/{n}", 1, 2.0, tokens=n)) + "\n" for n in (2, 4))
                ),
            ),
            "sweep.py: POOLED is for arms that share no steps, and a has 2 lengths; leave it out",
        ),
        (
            lambda f: (f / "results.jsonl").write_text("garbage\n"),
            "results.jsonl, line 1, is damaged: Expecting value",
        ),
        (
            lambda f: (f / "results.jsonl").write_text('{"run": "a", "settings": {}}\n'),
            "results.jsonl: the record of a is damaged: it has no seed, total_params, activ",
        ),
        (damaged(loss="2"), "the record of a/1 is damaged: loss is '2'; delete that line"),
        (damaged(loss=math.nan), "the record of a/1 is damaged: loss is nan; delete that line"),
        (
            lambda f: (f / "results.jsonl").write_text(
                "".join(
                    json.dumps(record(arm, 1, 2.0, evaluated_tokens=[count, count])) + "\n"
                    for arm, count in (("a", 4789), ("b", 9401))
                )
            ),
            "a/1 was evaluated on 4,789 tokens and b/1 on 9,401, with the same settings of the te",
        ),
        (damaged(evaluations=[]), "the record of a/1 is damaged: evaluations is []; delete that"),
        (damaged(evaluations=[[1]]), "the record of a/1 is damaged: evaluations is [[1]]; delete"),
        (damaged(evaluated_tokens=[7]), "is damaged: evaluated_tokens is [7]; delete that line"),
        (damaged(losses=[7]), "the record of a/1 is damaged: losses is [7]; delete that line"),
        (damaged(layers={"1": 7}), "the record of a/1 is damaged: layers is {'1': 7}; delete that"),
        (damaged(revisions=[7]), "the record of a/1 is damaged: revisions is [7]; delete that"),
        (damaged(versions=7), "the record of a/1 is damaged: versions is 7; delete that line"),
    ],
)  # fmt: skip
def test_mistakes(change, message, folder, tmp_path, capsys):
    change(folder)
    assert main(["report", str(folder)]) == 2
    assert message in capsys.readouterr().err
    for command in (["report"], ["report", str(folder), f"--workdir={tmp_path}"]):
        assert main(command) == 2
        assert "needs a sweep's folder, or --workdir=DIR" in capsys.readouterr().err
    for base in "one", "":
        assert main(["report", f"--workdir={tmp_path}", f"--base={base}"]) == 2
    assert "--base is for a sweep's folder" in capsys.readouterr().err
    assert main(["report", f"--workdir={tmp_path}"]) == 2
    assert "no run in" in capsys.readouterr().err


def step(number, **changes):
    return {
        "step": number, "tokens": 7, "loss": 5.0, "lm_loss": 5.0, "tokens_per_second": 7.0,
        "layers/01/drop_fraction": 0.1,
        "layers/01/expert_load": [0.25, 0.75], "layers/01/expert_drop_fraction": [0.1, 0.0],
    } | changes  # fmt: skip


def test_a_runs_damaged_metrics(tmp_path, drawn, capsys):
    """One line, and the report of before stays; what an older version didn't log is left out."""
    save(resolve({"train": {"steps": 3}}), tmp_path / "config.json")

    def reported(*lines):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return main(["report", f"--workdir={tmp_path}"]), capsys.readouterr().err

    older = {name: value for name, value in step(1).items() if "layers" not in name}
    assert reported(older, step(2), step(3)) == (0, "")
    before = (tmp_path / "report" / "report.html").read_bytes()
    for lines, message in (
        ([], "metrics.jsonl holds no step yet"),
        ([{"step": 1, "loss": 2}], "the line of step 1 is damaged: it has no tokens, lm_loss, tok"),
        ([step("1")], "metrics.jsonl, line 1, is damaged: step is '1'; delete that line"),
        ([step(1, lm_loss="5")], "the line of step 1 is damaged: lm_loss is '5'; delete that line"),
        ([step(1), {"step": 1, "eval/loss": 2.0}], "step 1 is damaged: it has no eval/tokens, e"),
        (
            [step(1), step(2, **{"layers/01/expert_load": [1]})],
            "metrics.jsonl is damaged: odd values of layers/01/expert_load",
        ),
    ):
        code, err = reported(*lines)
        assert (code, err.count("\n")) == (2, 1) and message in err, message
        assert (tmp_path / "report" / "report.html").read_bytes() == before


def test_a_run_whose_report_cannot_be_written(tmp_path, capsys):
    save(resolve({"train": {"steps": 3}}), tmp_path / "config.json")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step(1)) + "\n")
    (tmp_path / "report").touch()
    assert main(["report", f"--workdir={tmp_path}"]) == 2
    line = only_line(capsys.readouterr().err)
    assert line == f"prmoe: {tmp_path}/report cannot be written: File exists"
