"""Text becomes a local path or one in a store; nothing else becomes a local folder `gs:`."""

import os
import sys
from pathlib import Path

import pytest

from prmoe_jax import stores, train
from prmoe_jax.cli import main
from prmoe_jax.errors import UserError
from tests.support.configs import settings
from tests.support.extras import needs_extra
from tests.support.lines import only_line
from tests.support.runs import SETTINGS

LOCAL = ["a", "/a/b", "a:b", "./a", "~/a", "C:/a", "tfds:lm1b", "a b://c"]
NO_STORE = {
    "foo://x": "foo://x: there is no store foo://; give a local folder, or gs://BUCKET",
    "s3://bucket/run": "there is no store s3://",
    "gs://": "gs://: the bucket is missing; give gs://BUCKET/FOLDER",
    "gs:///run": "gs:///run: the bucket is missing",
    "gs:/bucket/run": "gs:/bucket/run: a slash of gs:// is missing",
}


@pytest.mark.parametrize("text", LOCAL)
def test_a_local_path_is_what_it_was(text):
    for made in (stores.as_path(text), stores.as_local_path(text), stores.as_path(Path(text))):
        assert type(made) is type(Path(text)) and made == Path(text)
        assert stores.is_local(made)


@pytest.mark.parametrize("text", NO_STORE)
def test_what_names_no_store_is_refused(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    verbs = [["train", *SETTINGS], ["eval"], ["generate"], ["report"]]
    verbs.append(["export", "--kind=gpt2", "--out=out"])
    verbs.append(["import", "--kind=gpt2", "--source=source"])
    for verb in verbs:
        assert main([*verb, f"--workdir={text}"]) == 2
        line = only_line(capsys.readouterr().err)
        assert line.startswith("prmoe: argument --workdir: ") and NO_STORE[text] in line
    for name in ("teacher.workdir", "init.workdir", "data.cache_dir", "teacher.cache"):
        assert main(["train", *SETTINGS, f"--config.{name}={text}", "--workdir=run"]) == 2
        assert NO_STORE[text] in only_line(capsys.readouterr().err)
    assert not os.listdir()


@pytest.mark.parametrize(
    "option", ["--workdir", "--config.init.workdir", "--config.teacher.workdir"]
)
def test_without_the_extra_the_line_names_it(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "prmoe_jax.stores.gcs", raising=False)
    monkeypatch.delattr(stores, "gcs", raising=False)  # another test imported it
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    command = ["train", *SETTINGS, f"{option}=gs://bucket/run"]
    assert main(command + ["--workdir=run"] * (option != "--workdir")) == 2
    assert "gs:// needs gcsfs; pip install 'prmoe_jax[gcs]'" in only_line(capsys.readouterr().err)
    assert not os.listdir()


def test_a_path_that_lost_a_slash_is_refused(tmp_path, monkeypatch):
    """pathlib makes gs:/bucket of gs://bucket, a folder of the working directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="a slash of gs:// is missing; give text"):
        train(settings(), Path("gs://bucket/run"))
    assert not os.listdir()


@needs_extra("gcs", "gcsfs")
@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["sweep", "gs://bucket/sweep"], "argument folder: gs://bucket/sweep is in an object"),
        (["report", "gs://bucket/sweep"], "argument folder: gs://bucket/sweep is in an object"),
        (["import", "--kind=gpt2", "--source=gs://bucket/x", "--workdir=x"], "only local folders"),
        (["plan", *SETTINGS, "--picture=gs://bucket/x.png"], "argument --picture: gs://bucket/x."),
        (
            ["train", *SETTINGS, "--config.data.cache_dir=gs://bucket/cache"],
            "data.cache_dir=gs://bucket/cache is in an object store; this setting needs a local",
        ),
        (["train", *SETTINGS, "--config.data.corpus=gs://bucket/text"], "data.corpus=gs://bucket/t"),
        (["train", "--config=gs://bucket/tiny.py:prmoe"], "there only a run's config.json"),
    ],
)  # fmt: skip
def test_what_works_on_disks_only_says_so(command, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert line in only_line(capsys.readouterr().err)
    assert not os.listdir()
