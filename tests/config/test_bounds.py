"""Settings that nothing can compute with or no file system can hold: one line each, at once."""

import math

import pytest

from configs import paper, tiny
from prmoe_jax.cli import main
from prmoe_jax.config.loading import load, resolve
from prmoe_jax.config.schema import Config, declarations, default_config, leaves
from prmoe_jax.config.validation import LARGEST
from prmoe_jax.errors import UserError
from prmoe_jax.stores import expand
from tests.support.configs import OTHER_VALUES, tiny_config
from tests.support.faults import at_most

VALUES = leaves(Config())
DECLARED = declarations()
PATHS = [name for name, d in DECLARED.items() if d.path]
WHOLE = [name for name, value in VALUES.items() if type(value) in (int, tuple)]
LARGEST_OF = {name: DECLARED[name].most for name in WHOLE if DECLARED[name].most}


def refused(build, *expected):
    """One line, in no time."""
    with at_most(20), pytest.raises(UserError) as error:
        build()
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    for text in expected:
        assert text in message


def nested(name, value):
    """Settings as a config file has them."""
    group, _, setting = name.rpartition(".")
    inner = {setting: value}
    return {group: inner} if group else inner


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_have_a_largest_value(name):
    for value in (10**20, LARGEST_OF.get(name, LARGEST) + 1):
        refused(lambda: resolve(nested(name, value)), f"{name}=", "is out of range")  # noqa: B023
    refused(lambda: resolve(nested(name, -(10**20))), f"{name}=", "is out of range")


def test_each_of_several_numbers_has_a_largest_value():
    refused(
        lambda: tiny_config(f"model.experts=4,{2**31},8"), "model.experts=(4, 2147483648, 8) is"
    )


@pytest.mark.parametrize(
    ("length", "group", "use"), [(2147483647, 5, 1), (2**30, 3 * 2**20, 2**21)]
)
def test_a_divisor_of_a_long_context_is_found_at_once(length, group, use):
    batch = ["train.batch_size=1", f"model.length={length}", f"moe.group_size={group}"]
    refused(lambda: tiny_config(*batch), f"nor is a multiple of model.length={length}; use {use}")


@pytest.mark.parametrize("name", ["moe.capacity_factor", "moe.eval_capacity_factor"])
def test_a_capacity_is_a_number_or_no_limit(name):
    refused(lambda: tiny_config(f"{name}=1e10"), f"{name}=10000000000.0 is out of range; use at")
    assert leaves(tiny_config(f"{name}=inf"))[name] == math.inf
    refused(lambda: tiny_config(f"{name}=-inf"), "must be finite, or inf")


def test_what_the_paper_and_every_other_value_of_the_tests_need_is_in_bounds():
    for name in paper.ROWS:
        resolve(paper.get_config(name))
    for name, (_, value) in OTHER_VALUES.items():
        largest = LARGEST_OF.get(name, LARGEST)
        for number in value if isinstance(value, tuple) else (value,):
            assert not isinstance(number, int) or number <= largest


def with_path(name, value):
    settings = default_config()
    settings.train.steps = 1
    settings.teacher.workdir = "runs/a"
    group, setting = name.split(".")
    settings[group][setting] = value
    if name == "teacher.cache":
        settings.kd.kind, settings.kd.top_k = "top_k", 3
    return settings


@pytest.mark.parametrize("name", PATHS)
def test_paths_that_no_file_system_holds(name):
    for value in ("a\0b", "a\ud800b", "a\x1b[2Jb"):
        refused(lambda: resolve(with_path(name, value)), name, f"{value!r} holds a character")  # noqa: B023
    for value in ("x" * 255, "é" * 127, "a b/c d"):
        assert leaves(resolve(with_path(name, value)))[name] == value


def test_an_architecture_of_more_layers_than_can_be_listed(capsys):
    for text in ("2 layers, E=8x99999999999", f"{'9' * 5000} layers", f"2 layers, E={'9' * 5000}"):
        with at_most(20):
            assert main(["params", f"--config={tiny.__file__}:{text}"]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("prmoe: ")


def test_settings_nested_too_deeply(tmp_path, capsys):
    path = tmp_path / "config.json"
    for content in ("[" * 99999, '{"model":' * 99999):
        path.write_text(content)
        refused(lambda: load(path), "config.json is damaged: it is nested too deeply")
        assert main(["params", f"--config={path}"]) == 2
        assert "is damaged: it is nested too deeply" in capsys.readouterr().err
    path.write_text('{"seed": ' + "9" * 5000 + "}")
    refused(lambda: load(path), "config.json is damaged: Exceeds the limit")


def test_a_home_directory_that_is_not_known(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(expand("data.corpus", "~/a/~b")) == "/home/someone/a/~b"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert str(expand("data.corpus", "a/~")) == "a/~"
    refused(
        lambda: expand("data.corpus", "~/a"),
        "data.corpus=~/a: Could not determine home directory",
    )
    refused(
        lambda: expand("data.corpus", "~nobody-of-this-name/a"),
        "Could not determine home direct",
    )


def test_settings_do_not_need_a_home_directory(monkeypatch):
    """Only what uses a folder in it does."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert tiny_config("data.corpus=~/x").data.cache_dir == "~/.cache/prmoe_jax"


@pytest.mark.parametrize("name", [name for name, d in DECLARED.items() if d.choices])
def test_choices_are_those_declared(name):
    """Another value is refused, with the list; the default is one of them."""
    assert DECLARED[name].default in DECLARED[name].choices
    with pytest.raises(UserError) as caught:
        tiny_config(f"{name}=nonsense")
    assert f"{name}='nonsense' is unknown; use one of {', '.join(DECLARED[name].choices)}" in str(
        caught.value
    )


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    for name, declared in DECLARED.items():
        assert f"--config.{name}=" in shown
        assert " ".join(declared.described().split()) in words, name
