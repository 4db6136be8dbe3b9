"""Files that users wrote: whatever they do is told in one line, and stdout stays clean."""

import json

import pytest

from prmoe_jax.cli import main
from prmoe_jax.cli.options import parse_config
from prmoe_jax.config import userfile
from prmoe_jax.errors import UserError
from tests.support.lines import only_line


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("exit()", "c.py fails at line 1: SystemExit: None"),
        ("def get_config():\n    raise SystemExit(7)", "c.py fails at line 2: SystemExit: 7"),
        ("raise GeneratorExit", "c.py fails at line 1: GeneratorExit:"),
        ("raise StopIteration(7)", "c.py fails at line 1: StopIteration: 7"),
        ("class Own(BaseException): pass\nraise Own('a\\nb')", "at line 2: Own: a b"),
        (
            "class Silent(Exception):\n    def __str__(self):\n        exit()\nraise Silent",
            "c.py fails at line 4: Silent: (its message cannot be shown)",
        ),
        (
            "class Odd(Exception):\n    def __str__(self):\n        return 7\nraise Odd",
            "c.py fails at line 4: Odd: (its message cannot be shown)",
        ),
        ("def get_config():\n    return get_config()", "c.py fails at line 2: RecursionError: "),
    ],
)
def test_a_config_file_that_fails(code, message, tmp_path, capsys):
    (tmp_path / "c.py").write_text(code)
    assert main(["params", f"--config={tmp_path / 'c.py'}"]) == 2
    out, err = capsys.readouterr()
    line = only_line(err)
    assert message in line and line.startswith("prmoe: --config=") and out == ""


@pytest.mark.parametrize("kind", ["ConfigDict", "FrozenConfigDict"])
def test_a_config_file_need_not_name_every_setting(kind, tmp_path, capsys):
    """Those that it leaves out can be overridden, too."""
    (tmp_path / "c.py").write_text(
        f"from ml_collections import {kind}\n"
        "MODEL = {'layers': 2, 'heads': 4, 'd_model': 16, "
        "'placement': 'every 2', 'experts': [3], 'dropout': 0}\n"
        f"def get_config():\n    return {kind}({{'model': MODEL, 'train': {{'steps': 3}}}})\n"
    )
    command = ["params", f"--config={tmp_path / 'c.py'}", "--json"]
    overrides = ["model.heads=2", "model.dropout=0.5", "moe.capacity_factor=2", "seed=7"]
    assert main([*command, *(f"--config.{override}" for override in overrides)]) == 0
    assert json.loads(capsys.readouterr().out)["total_params"] > 0
    parsed = parse_config([command[1], *(f"--config.{override}" for override in overrides)])
    assert (parsed.model.heads, parsed.model.layers, parsed.model.experts) == (2, 2, (3,))
    assert (parsed.model.dropout, parsed.moe.capacity_factor, parsed.seed) == (0.5, 2.0, 7)
    assert parsed.train.steps == 3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hedas": 4}, "config.model.hedas is not a setting"),
        ({"heads": "four"}, "config.model.heads="),
        (7, "config.model must be a group of settings, not 7"),
    ],
)
def test_wrong_settings_of_a_short_config_file(model, message, tmp_path, capsys):
    (tmp_path / "c.py").write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({{'model': {model}, 'train': {{'steps': 3}}}})"
    )
    assert main(["params", f"--config={tmp_path / 'c.py'}"]) == 2
    line = only_line(capsys.readouterr().err)
    assert message in line and "internal error" not in line


def test_ctrl_c_in_a_users_file_is_no_mistake(tmp_path):
    (tmp_path / "c.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        userfile.call(tmp_path / "c.py", "f", named="c.py")
    with pytest.raises(UserError, match="its own words"):
        with userfile.mistakes(tmp_path / "c.py", "c.py"):
            raise UserError("its own words")


def test_what_a_config_file_prints_is_no_result(tmp_path, capsys):
    (tmp_path / "c.py").write_text(
        "from prmoe_jax.config import default_config\nprint('read')\n"
        "def get_config():\n    print('called')\n    config = default_config()\n"
        "    config.train.steps = 3\n    return config\n"
    )
    assert main(["params", f"--config={tmp_path / 'c.py'}", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) and err == "read\ncalled\n"
    print("afterwards")
    assert capsys.readouterr().out == "afterwards\n"
