"""What a user gets wrong: one line that says what and how to mend it, and nothing damaged."""

import fcntl
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import jax
import pytest

from configs import paper, tiny
from prmoe_jax.cli import main
from tests.support.faults import file_size_limit
from tests.support.runs import NEW, SETTINGS, train_in

TINY = f"--config={tiny.__file__}:6 layers, E=4x2+8, residual"
DENSE = f"--config={tiny.__file__}:6 layers"
HUGE = 10**20
RESUME = ["train", "--workdir=run", *SETTINGS]

NOT_UTF8 = (
    "not UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte; "
    "convert it"
)


def params(*overrides, config=TINY):
    return ["params", config, *(f"--config.{override}" for override in overrides)]


def new(*overrides):
    return [*NEW, *(f"--config.{override}" for override in overrides)]


def resume(*overrides):
    return [*RESUME, *(f"--config.{override}" for override in overrides)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a corpus, its cache and a finished run, named relative to it."""
    return train_in(tmp_path_factory.mktemp("trained"), RESUME)


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of `trained` to spoil; the working directory."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "here"))
    return Path.cwd()


def content(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write(path, text):
    """A preparation that writes a file."""

    def prepare(monkeypatch):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())

    return prepare


def empty_folder(monkeypatch):
    Path("empty").mkdir()


def one_document(monkeypatch):
    write("single/a.txt", "one document")(monkeypatch)


def no_tokenizer(monkeypatch):
    Path("run/tokenizer.json").unlink()


def no_network(monkeypatch):
    def no_route(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", no_route)


def cpu_only(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("this machine has the accelerator")


def locked(monkeypatch):
    """A lock that only an exclusive one minds; held for as long as the file stays open."""
    file = open("run/.lock", "w+")
    fcntl.flock(file, fcntl.LOCK_SH)
    file.write("4711")
    file.flush()
    return file


def locked_by_garbage(monkeypatch):
    file = open("run/.lock", "wb+")
    fcntl.flock(file, fcntl.LOCK_SH)
    file.write(b"\xff\0\n4711")
    file.flush()
    return file


def another_tokenizer(monkeypatch):
    path = Path("run/tokenizer.json")
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))


def larger_tokenizer(monkeypatch):
    path = Path("run/tokenizer.json")
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"word{i}": 300 + i for i in range(100)}
    path.write_text(json.dumps(tokenizer))


def no_checkpoint(monkeypatch):
    shutil.rmtree("run/checkpoints")


def no_config(monkeypatch):
    Path("run/config.json").unlink()


# A case: the arguments, what the message has to say, and what to prepare beforehand.
CASES = {
    # The command line itself.
    "no verb": ([], "the following arguments are required: VERB; see prmoe --help"),
    "unknown verb": (["fly"], "invalid choice: 'fly'"),
    "no config": (["params"], "no --config; for example --config=configs/tiny.py:prmoe"),
    "no config to train": (["train", "--workdir=new"], "no --config; for example"),
    "config without value": (["params", "--config"], "argument --config: expected one argument"),
    "config empty": (["params", "--config="], "no --config; for example"),
    "config file missing": (["params", "--config=nope.py:a"], "--config=nope.py is not a file"),
    "config is a folder": (["params", "--config=corpus"], "--config=corpus is neither a file nor"),
    "unknown name": (
        ["params", f"--config={tiny.__file__}:prmo"],
        "configs/tiny.py has no 'prmo'; use dense, moe, first_half",
    ),
    "unknown name in the paper": (
        ["params", f"--config={paper.__file__}:prmoe_2b"],
        "configs/paper.py has no 'prmoe_2b'; use one of dense_350m, ",
    ),
    "bad architecture": (
        ["params", f"--config={tiny.__file__}:6 layers, E=8, residue"],
        "architecture '6 layers, E=8, residue': 'residue' is not understood; write for example",
    ),
    "unknown flag": (["params", TINY, "--jsn"], "'--jsn' is not understood; settings look like"),
    "abseil's own flag": (["params", TINY, "--flagfile=x"], "'--flagfile=x' is not understood"),
    "short flag": (["params", TINY, "-x"], "'-x' is not understood; settings look like"),
    "stray argument": (["params", TINY, "stray"], "'stray' is not understood; settings look like"),
    "config for paper": (["params", "--paper", TINY], "--paper shows fixed configs; leave out"),
    "run for paper": (["params", "--paper", "--workdir=run"], "fixed configs; leave out --workdir"),
    "run and config": (["params", "--workdir=run", TINY], "own config; leave out --config="),
    "params of nothing": (["params", "--workdir=none"], "no run in none: config.json is missing"),
    "eval without run": (["eval"], "the following arguments are required: --workdir; see prmoe ev"),
    "eval with config": (["eval", "--workdir=run", TINY], "is not understood; see prmoe eval --h"),
    "tokens not a number": (
        ["generate", "--workdir=run", "--tokens=x"],
        "argument --tokens: invalid int value: 'x'; see prmoe generate --help",
    ),
    # Overrides.
    "misspelled group": (
        params("modle.layers=2"),
        "--config.modle.layers is not a setting; did you mean --config.model.layers?",
    ),
    "misspelled setting": (params("train.stepz=2"), "did you mean --config.train.steps?"),
    "misspelled seed": (params("seeed=2"), "did you mean --config.seed?"),
    "group left out": (params("layers=2"), "did you mean --config.model.layers?"),
    "nothing like it": (params("zzzz=2"), "is not a setting; there are seed, model, moe, mesh, ex"),
    "no name": (params("=2"), "--config. is not a setting"),
    "a group": (params("model=2"), "--config.model is not a setting but a group of them, such as"),
    "no value": (params("model.layers"), "understood; write --config.model.layers=VALUE"),
    "text for a number": (params("model.layers=six"), "--config.model.layers=six must be of type "),
    "exponent for int": (params("train.steps=1e3"), "--config.train.steps=1e3 must be of type int"),
    "fraction for int": (params("model.layers=2.0"), "--config.model.layers=2.0 must be of type i"),
    "text for float": (params("model.dropout=a"), "--config.model.dropout=a must be of type float"),
    "text for bool": (params("model.residual=maybe"), "model.residual=maybe must be of type bool"),
    "value for no-flag": (
        ["params", TINY, "--noconfig.model.residual=3"],
        "'--noconfig.model.residual=3' is not understood; write --config.model.residual=VALUE",
    ),
    "garbage for tuple": (params("model.experts=4,a"), "must be whole numbers such as 8,8,16"),
    "half a tuple": (params("model.experts=(4,4"), "model.experts=(4,4 must be whole numbers such"),
    "fractions in tuple": (params("model.experts=4.5,3"), "must be whole numbers such as 8,8,16"),
    # Config files.
    "not Python": (
        ["params", "--config=corpus/0.txt"],
        "--config=corpus/0.txt fails: SyntaxError: invalid syntax (0.txt, line 1)",
    ),
    "syntax error": (
        ["params", "--config=c.py"],
        "--config=c.py fails: SyntaxError: '(' was never closed (c.py, line 2)",
        write("c.py", "\ndef get_config(\n"),
    ),
    "binary config": (["params", "--config=c.py"], "--config=c.py fails", write("c.py", b"\0\xff")),
    "no get_config": (
        ["params", "--config=c.py"],
        "--config=c.py defines no function get_config",
        write("c.py", "x = 1\n"),
    ),
    "config raises": (
        ["params", "--config=c.py:7"],
        "--config=c.py fails at line 2: ValueError: not 7",
        write("c.py", "def get_config(name):\n  raise ValueError(f'not\\n{name}')\n"),
    ),
    "config takes no name": (
        ["params", "--config=c.py:a"],
        "--config=c.py fails: TypeError: get_config() takes 0 positional arguments but 1",
        write("c.py", "def get_config():\n  return None\n"),
    ),
    "config returns nothing": (
        ["params", "--config=c.py"],
        "--config=c.py: get_config returns NoneType, not a ConfigDict; start from prmoe_jax.conf",
        write("c.py", "def get_config():\n  return None\n"),
    ),
    "config of other types": (
        ["params", "--config=c.py"],
        "--config=c.py fails at line 4: TypeError: ",
        write(
            "c.py",
            "from prmoe_jax.config import default_config\ndef get_config():\n"
            "  config = default_config()\n  config.model.layers = 'six'\n  return config\n",
        ),
    ),
    "unknown key in config": (
        ["params", "--config=c.py"],
        "config.modle is not a setting; did you mean 'model'?",
        write(
            "c.py",
            "from prmoe_jax.config import default_config\ndef get_config():\n"
            "  config = default_config()\n  config.modle = 3\n  return config\n",
        ),
    ),
    # Values that do not fit; test_config.py has every rule.
    "heads": (
        params("model.d_model=192", "model.heads=5"),
        "model.d_model=192 is not divisible by model.heads=5; use d_model=195",
    ),
    "accumulate": (
        params("train.batch_size=16", "train.accumulate=3"),
        "train.batch_size=16 is not divisible by train.accumulate=3; use 1",
    ),
    "group size": (params("moe.group_size=257"), "moe.group_size=257 neither divides nor is a"),
    "experts of layers": (params("model.experts=4,8"), "makes 3 MoE layers of 6 layers; give 3"),
    "dropout": (params("model.dropout=1"), "model.dropout=1.0 is out of range; use less than 1"),
    "learning rate": (params("optimizer.learning_rate=-1"), "rate=-1.0 is out of range; use more"),
    "minimum rate": (params("optimizer.min_learning_rate=1"), "=1.0 exceeds learning_rate="),
    "steps": (params("train.steps=-2"), "train.steps=-2 is out of range; use 0 or more"),
    "batch": (params("train.batch_size=0"), "train.batch_size=0 is out of range; use 1 or more"),
    "decay": (params("optimizer.decay_tokens=5"), "decay_tokens=5 must be above warmup_tokens="),
    "dtype": (params("model.dtype=f32"), "model.dtype='f32' is unknown; use one of bfloat16, flo"),
    "remat": (params("execution.remat=some"), "execution.remat='some' is unknown; use one of auto"),
    "attention": (params("execution.attention=x"), "execution.attention='x' is unknown"),
    "dispatch": (params("execution.dispatch=x"), "execution.dispatch='x' is unknown"),
    "placement": (params("model.placement=x"), "placement 'x' is unknown; use 'none', 'every 2'"),
    "steps and tokens": (params("train.tokens=9"), "exactly one must be above 0"),
    "random selection": (
        params("moe.overflow=random", "moe.capacity_factor=inf"),
        "moe.overflow=random has no effect with moe.capacity_factor=inf: no expert is full",
    ),
    "dense top": (params("model.top_k=2", config=DENSE), "model.top_k=2 has no effect without"),
    "dense residual": (params("model.residual=true", config=DENSE), "model.residual=True has no "),
    "dense experts": (params("model.experts=4", config=DENSE), "experts=4 has no effect: placeme"),
    "dense moe": (params("moe.min_capacity=1", config=DENSE), "moe.min_capacity=1 has no effect"),
    "splash without TPU": (new("execution.attention=splash"), "attention=splash needs a tpu, th"),
    "cudnn without GPU": (
        new("execution.attention=cudnn", "model.dtype=bfloat16"),
        "execution.attention=cudnn needs a gpu, this is a cpu; use auto",
        cpu_only,
    ),
    "profile": ([*NEW, "--profile=now"], "--profile=now must be FIRST:LAST, two steps such as"),
    "profile backwards": ([*NEW, "--profile=2:1"], "--profile=2:1 must be two steps in"),
    "profile of digits": ([*NEW, f"--profile=1:{'9' * 5000}"], "must be FIRST:LAST, two steps"),
    "profile from 0": ([*NEW, "--profile=0:1"], "--profile=0:1 must be two steps in"),
    "profile in unicode": ([*NEW, "--profile=1:²"], "--profile=1:² must be FIRST:LAST"),
    "profile too long": (
        [*NEW, "--profile=1:3"],
        "--profile=1:3 must be two steps in their order, from 1 to the run's 2",
    ),
    # Corpora and tokenizers.
    "no corpus": (new("data.corpus=sotuu"), "corpus 'sotuu' does not exist; give 'sotu', 'tfds:"),
    "no corpus path": (new("data.corpus=no/*.txt"), "corpus 'no/*.txt' does not exist; give"),
    "empty folder": (new("data.corpus=empty"), "file in the folder 'empty'", empty_folder),
    "one document": (new("data.corpus=single"), "at least 2: split the text into", one_document),
    "binary file": (
        new("data.corpus=x.txt"),
        "x.txt: " + NOT_UTF8,
        write("x.txt", b"\xff\xfe"),
    ),
    "kind of file": (
        new("data.corpus=x.csv"),
        "x.csv: unsupported kind of file; use .txt, .jsonl",
        write("x.csv", "a,b\n"),
    ),
    "malformed line": (
        new("data.corpus=x.jsonl"),
        "x.jsonl:2: not a line of UTF-8 JSON",
        write("x.jsonl", '{"text": "a"}\n{"text": \n'),
    ),
    "text field": (
        new("data.corpus=x.jsonl"),
        "x.jsonl:1: no field 'text'; it has body; set --config.data.text_field",
        write("x.jsonl", '{"body": "a"}\n'),
    ),
    "TFDS name": (new("data.corpus=tfds:lm1c"), "no dataset 'lm1c'; did you mean lm1b?"),
    "TFDS config": (new("data.corpus=tfds:c4/enn"), "TFDS dataset 'c4' has no config 'enn'; it h"),
    "no network": (new("data.corpus=tfds:lm1b"), "reached: <urlopen error no route>", no_network),
    "tokenizer missing": (new("data.tokenizer=no.json"), "'no.json' is not an existing file, nor"),
    "tokenizer of text": (
        new("data.tokenizer=corpus/0.txt"),
        "corpus/0.txt: not a tokenizer.json: ",
    ),
    "tokenizer too large": (
        new("data.tokenizer=run/tokenizer.json", "model.vocab_size=200"),
        "tokenizer has 257 entries, model.vocab_size=200 is smaller; set --config.model.vocab_s",
    ),
    "cache in a file": (
        new("data.cache_dir=corpus/0.txt/cache"),
        "cannot write the cache corpus/0.txt/cache/",
    ),
    # Workdirs.
    "workdir in a file": (
        [*NEW[:1], "--workdir=corpus/0.txt/run", *SETTINGS],
        "--workdir=corpus/0.txt/run cannot be written: Not a directory",
    ),
    "workdir is a file": (
        [*NEW[:1], "--workdir=corpus/0.txt", *SETTINGS],
        "--workdir=corpus/0.txt cannot be written: File exists",
    ),
    "workdir in use": (RESUME, "--workdir=run is in use by another run (process 4711);", locked),
    "lock of garbage": (RESUME, "in use by another run (process unknown);", locked_by_garbage),
    "eval nothing": (["eval", "--workdir=no"], "no run in no: config.json is missing"),
    "a name in a run": (
        ["params", "--config=run/config.json:moe"],
        "--config=run/config.json:moe: a run's config.json has no names; give it alone",
    ),
    "eval a file": (["eval", "--workdir=corpus/0.txt"], "no run in corpus/0.txt: config.json is "),
    "eval no checkpoint": (
        ["eval", "--workdir=run"],
        "run/checkpoints; train the run first",
        no_checkpoint,
    ),
    "eval damaged config": (
        ["eval", "--workdir=run"],
        "run/config.json is damaged: Expecting",
        write("run/config.json", '{"seed": '),
    ),
    "eval unknown setting": (
        ["eval", "--workdir=run"],
        "run/config.json: config.sed is not a setting; did you mean 'seed'?",
        write("run/config.json", '{"sed": 1}'),
    ),
    "generate nothing": (["generate", "--workdir=no"], "no run in no: config.json is missing"),
    "generate no checkpoint": (
        ["generate", "--workdir=run"],
        "run/checkpoints; train the run first",
        no_checkpoint,
    ),
    "no tokens": (["generate", "--workdir=run", "--tokens=0"], "--tokens=0 must be 1 or more"),
    "temperature": (
        ["generate", "--workdir=run", "--temperature=-1"],
        "--temperature=-1.0 must be 0 or more",
    ),
    "samples of one text": (
        ["generate", "--workdir=run", "--temperature=0", "--samples=3"],
        "--samples has no effect with --temperature=0, which takes the top token; leave one",
    ),
    "top k of one": (
        ["generate", "--workdir=run", "--temperature=0", "--top-k=3"],
        "--top-k has no effect with --temperature=0",
    ),
    "temperature nan": (
        ["generate", "--workdir=run", "--temperature=nan"],
        "--temperature=nan must be 0 or more, and finite",
    ),
    "seed of the sampling": (
        ["generate", "--workdir=run", "--seed=4294967296"],
        "--seed=4294967296 is out of range; use a value from 0 to 4294967295",
    ),
    "top k": (["generate", "--workdir=run", "--top-k=-1"], "--top-k=-1 must be 0 (all tokens) or"),
    "top p": (["generate", "--workdir=run", "--top-p=0"], "--top-p=0.0 must be above 0, up to 1"),
    "samples": (["generate", "--workdir=run", "--samples=0"], "--samples=0 must be 1 or more"),
    "too many samples": (
        ["generate", "--workdir=run", f"--samples={HUGE}"],
        f"--samples={HUGE} must be 1 or more, up to 1000000",
    ),
    "too many tokens": (
        ["generate", "--workdir=run", f"--tokens={HUGE}"],
        f"the prompt's 1 tokens and --tokens={HUGE} exceed the context of 32",
    ),
    "seed of many digits": (
        ["generate", "--workdir=run", f"--seed={HUGE}"],
        f"--seed={HUGE} is out of range; use a value from 0 to 4294967295",
    ),
    "huge top k": (
        ["generate", "--workdir=run", f"--top-k={HUGE}"],
        f"--top-k={HUGE} must be 0 (all tokens) or more, up to 2147483647",
    ),
    "top p nan": (
        ["generate", "--workdir=run", "--top-p=nan"],
        "--top-p=nan must be above 0, up to 1",
    ),
    "top p inf": (
        ["generate", "--workdir=run", "--top-p=inf"],
        "--top-p=inf must be above 0, up to 1",
    ),
    "empty stop": (
        ["generate", "--workdir=run", "--stop=."] + ["--stop="],
        "--stop= is empty, and would end every text at once; leave it out",
    ),
    "prompt not UTF-8": (
        ["generate", "--workdir=run", "--prompt=caf\udce9"],
        r"the argument '--prompt=caf\udce9' is not UTF-8 text",
    ),
    "stop not UTF-8": (
        ["generate", "--workdir=run", "--stop=\udce9"],
        r"the argument '--stop=\udce9' is not UTF-8 text",
    ),
    "generate without tokenizer": (
        ["generate", "--workdir=run"],
        "run/tokenizer.json: cannot be read: ",
        no_tokenizer,
    ),
    "generate with a torn tokenizer": (
        ["generate", "--workdir=run"],
        "run/tokenizer.json: not a tokenizer.json: ",
        write("run/tokenizer.json", '{"version": "1.0", "mod'),
    ),
    "generate with an empty tokenizer": (
        ["generate", "--workdir=run"],
        "run/tokenizer.json: not a tokenizer.json: ",
        write("run/tokenizer.json", ""),
    ),
    "generate with a binary tokenizer": (
        ["generate", "--workdir=run"],
        "run/tokenizer.json: " + NOT_UTF8,
        write("run/tokenizer.json", b"\xff\xfe"),
    ),
    "no tasks": (["eval", "--workdir=run", "--tasks="], "--tasks= has an empty name; use names su"),
    "no task between": (["eval", "--workdir=run", "--tasks=a,,b"], "--tasks=a,,b has an empty na"),
    "tasks on a text": (
        ["eval", "--workdir=run", "--tasks=cloze", "--corpus=corpus"],
        "--corpus is for the validation split; leave it or --tasks out",
    ),
    "eval on no text": (
        ["eval", "--workdir=run", "--corpus=sotuu"],
        "corpus 'sotuu' does not exist; give 'sotu', 'tfds:",
    ),
    "eval on an empty name": (
        ["eval", "--workdir=run", "--corpus="],
        "argument --corpus: is empty; if it was a shell variable, it isn't set",
    ),
    "limit of many digits": (
        ["eval", "--workdir=run", "--tasks=cloze", f"--limit={HUGE}"],
        f"--limit={HUGE} is a number of examples, for --tasks: from 1 to 9223372036854775807",
    ),
    "mesh axis": (
        ["generate", "--workdir=run", "--mesh=experts:2"],
        "--mesh=experts:2 must be axes and their devices such as expert:4,tensor:2; there are data",
    ),
    "mesh size": (["generate", "--workdir=run", "--mesh=tensor:3"], "mesh.tensor=3 makes 3 devic"),
    "mesh of none": (
        ["generate", "--workdir=run", "--mesh=expert:0,tensor:2"],
        "--mesh=expert:0,tensor:2 must be axes and their devices such as expert:4,tensor:2",
    ),
    "mesh twice": (
        ["generate", "--workdir=run", "--mesh=expert:1,expert:1"],
        "--mesh=expert:1,expert:1 must be axes and their devices",
    ),
    "mesh of very many": (
        ["generate", "--workdir=run", f"--mesh=expert_inner:{10**20}"],
        f"--mesh=expert_inner:{10**20} must be axes and their devices",
    ),
    "inner stage": (
        ["generate", "--workdir=run", "--mesh=expert_inner:8"],
        "mesh.expert=1: mesh.expert_inner=8 exceeds it; use mesh.expert_inner=1",
    ),
    "prompt too long": (
        ["generate", "--workdir=run", "--prompt=0123456789", "--tokens=22"],
        "the prompt's 11 tokens and --tokens=22 exceed the context of 32; shorten the prompt or "
        "use --tokens=21",
    ),
    "prompt without room for a token": (
        ["generate", "--workdir=run", f"--prompt={'0' * 40}", "--tokens=2"],
        "the prompt's 41 tokens and --tokens=2 exceed the context of 32; shorten the prompt",
    ),
    # Resuming.
    "another config": (
        resume("seed=3", "model.layers=2", "log.every=1"),
        "config: model.layers was 1, is 2, seed was 0, is 3; give the same settings to resume",
    ),
    "another vocabulary": (resume("model.vocab_size=512"), "model.vocab_size was 384, is 512"),
    "another length": (resume("train.steps=3"), "train.steps was 2, is 3"),
    "damaged config": (RESUME, "run/config.json is damaged", write("run/config.json", "{")),
    "lost config": (RESUME, "no run in run: config.json is missing", no_config),
    "another corpus": (
        RESUME,
        "the data changed since the checkpoint was written: corpus was ",
        write("corpus/new.txt", "another document"),
    ),
    "another tokenizer": (RESUME, "was written: tokenizer was ", another_tokenizer),
    "larger tokenizer": (RESUME, "tokenizer has 400 entries, model.vocab_si", larger_tokenizer),
}  # fmt: skip


def fails(arguments, capsys) -> str:
    """Runs a command that has to fail; its one line on stderr, besides the log."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    *log, message = err.splitlines()
    assert message.startswith("prmoe: ") and not any(line.startswith("prmoe:") for line in log)
    return message


@pytest.mark.parametrize("name", CASES)
def test_mistakes_are_answered_on_one_line(name, folder, monkeypatch, capsys):
    arguments, expected, *prepare = CASES[name]
    kept = [step(monkeypatch) for step in prepare]  # keeps what was opened open
    before = content(folder / "run"), content(folder / "corpus")
    assert expected in fails(arguments, capsys)
    assert (content(folder / "run"), content(folder / "corpus")) == before
    assert not (folder / "new" / "config.json").exists()
    del kept


def test_a_mistake_does_not_stand_in_the_way(folder, capsys):
    """After each kind of failure, the right command finds the run as it was."""
    fails(resume("seed=3"), capsys)
    fails([*RESUME[:2], "--config=corpus"], capsys)
    assert main(RESUME) == 0
    assert "the run is complete: step 2 of 2" in capsys.readouterr().err


def test_a_full_disk_is_named_and_leaves_no_half_cache(folder, capsys):
    before = set((folder / "cache").rglob("*"))
    with file_size_limit(1000):
        message = fails(new("data.tokenizer=bpe"), capsys)
    assert re.search(
        "cannot write the cache cache/tokenizers/.*: File too large; make room", message
    )
    left = {path for path in set((folder / "cache").rglob("*")) - before if path.is_file()}
    assert {path.suffix for path in left} <= {".lock"}


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(folder, capsys):
    (folder / "closed").mkdir(mode=0o500)
    arguments = [NEW[0], "--workdir=closed/run", *SETTINGS]
    assert "--workdir=closed/run cannot be written: Permission denied" in fails(arguments, capsys)
