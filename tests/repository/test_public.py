"""The package's front door, and configs that are found from anywhere."""

import json
import subprocess
import sys

import pytest

import prmoe_jax


@pytest.mark.parametrize("name", prmoe_jax.__all__)
def test_public_names_are_there(name):
    assert getattr(prmoe_jax, name).__doc__
    assert name in dir(prmoe_jax)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        prmoe_jax.trian  # noqa: B018
    with pytest.raises(ImportError, match="trian"):
        from prmoe_jax import trian  # noqa: F401


def test_importing_the_package_imports_nothing_else():
    code = "import sys, prmoe_jax; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("config", ["tiny:prmoe", "paper:prmoe_1.3b", "prose:prmoe"])
def test_shipped_configs_are_found_from_anywhere(config, tmp_path):
    """The short form and the path of the same file give the same model; a folder is no file."""
    name, _, architecture = config.partition(":")
    (tmp_path / name).mkdir()
    path = prmoe_jax.architecture.__file__.rpartition("/prmoe_jax/")[0] + f"/configs/{name}.py"
    found = []
    for given in (config, f"{path}:{architecture}"):
        command = [sys.executable, "-m", "prmoe_jax", "params", f"--config={given}", "--json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]


def test_a_config_of_another_name_says_which_there_are(capsys):
    from prmoe_jax.cli import main

    assert main(["params", "--config=tony:prmoe"]) == 2
    said = capsys.readouterr().err
    assert "--config=tony is neither a file nor one of the configs" in said
    assert "paper, prose, tiny" in said
