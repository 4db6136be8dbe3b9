"""`prmoe check`: green where nothing is wrong, and red with the right line for each fault."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from configs import tiny
from prmoe_jax import stores
from prmoe_jax.check import benchmarks, corpus, environment, kernels, rates, run, trial
from prmoe_jax.check.findings import FAIL, OK, WARN, Finding, Part, slow, table
from prmoe_jax.cli import main
from prmoe_jax.config.schema import MeshConfig
from prmoe_jax.errors import UserError
from prmoe_jax.moe import dispatch
from tests.support.configs import tiny_config
from tests.support.extras import needs_extra
from tests.support.paths import REPOSITORY
from tests.support.runs import finish

QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def start(faults, *arguments, devices=4, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.checked", ",".join(faults), *arguments],
        cwd=REPOSITORY,
        env=os.environ | QUICKLY | {"JAX_NUM_CPU_DEVICES": str(devices)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def found(record, name):
    """The findings of a name, as (process, status, line)."""
    return [
        (finding["process"], finding["status"], finding["line"])
        for finding in record["findings"]
        if finding["name"] == name
    ]


@pytest.mark.slow
def test_green_on_four_devices(tmp_path):
    """All kernels, rates and a run; what was not there before is not there afterwards."""
    process = start([], "--json", f"--workdir={tmp_path}/new/deeper")
    code, out, err = finish(process)
    assert code == 0, err
    assert list(tmp_path.iterdir()) == []
    record = json.loads(out)
    assert {finding["status"] for finding in record["findings"]} == {OK}
    names = {finding["name"] for finding in record["findings"]}
    assert {f"dispatch {name}" for name in (*dispatch.BACKENDS, "per_token")} <= names
    assert {"attention xla", "attention blocks", "attention with KV cache"} <= names
    assert {f"exchange {name}" for name in ("flat", "hierarchical", "coordinated")} <= names
    assert {"exchange flat, nothing dropped", "exchange coordinated, nothing dropped"} <= names
    assert "exchange flat, few tokens, nothing dropped" in names
    for name, dtypes in record["kernels"].items():
        for dtype, errors in dtypes.items():
            assert 0 <= max(errors.values()) <= kernels.TOLERANCES[dtype], (name, dtype)
    # The dtype is the one that was computed in.
    gather = record["kernels"]["dispatch gather"]
    assert gather["bfloat16"]["forward"] > 1e-3 > gather["float32"]["forward"]
    assert [device["device"] for device in record["rates"]["devices"]] == [0, 1, 2, 3]
    assert min(record["rates"]["collectives"].values()) > 0
    assert record["run"]["read_bytes_per_s"][0] > 0
    assert record["environment"]["device_count"] == 4
    assert record["environment"]["git_revision"]
    assert "all is well" in err and "dispatch gather" in err


def test_faults_of_devices(tmp_path):
    """A busy device, one that computes other numbers, and a collective that loses a part."""
    faults = "only_rates", "busy_device", "miscalculating_device", "losing_all_to_all"
    code, out, err = finish(start(faults, f"--workdir={tmp_path}"))
    assert code == 1
    host = socket.gethostname()
    for name in ("product in bfloat16", "product in float32"):
        (line,) = [line for line in out.splitlines() if line.startswith(f"  rates: {name}: slow:")]
        assert f"device 2 of {host} (process 0)" in line and line.count("of the median") == 1
        assert "end other programs there" in line
    (line,) = [line for line in out.splitlines() if line.startswith("  rates: exact products: ")]
    wrong = r"bfloat16 on device 0 by 0\.[01]\d*, float32 on device 0 by 0\.[01]\d*; leave these"
    assert re.search(f"off, of the largest number: {wrong}", line)
    assert "  rates: collectives: wrong results: all_to_all on device 0, " in out
    assert "all_reduce on device" not in out
    assert "  rates: memory" not in out  # which no fault touches
    assert err.splitlines()[-1].startswith("prmoe: 4 of 8 findings are wrong")


@pytest.mark.slow
def test_two_processes(tmp_path):
    """One names the process whose memory is slow, and who calculates differently.

    The run of both is right, and all of their devices are those of one host.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    arguments = "--distributed", "--json", f"--workdir={tmp_path}/runs"
    started = [
        start(
            ["no_kernels", "busy_process_1", "miscalculating_process_1", "another_version"],
            *arguments,
            devices=2,
            JAX_PROCESS_ID=str(i),
            **variables,
        )
        for i in range(2)
    ]
    (code, out, err), (code_1, out_1, err_1) = map(finish, started)
    assert (code, code_1) == (1, 1), err + err_1
    assert out and not out_1, err + err_1
    record = json.loads(out)
    _, (process, status, line) = found(record, "memory")  # the first is its size
    assert (process, status) == (0, FAIL)
    assert line.startswith("slow: ") and line.count(" (process 1) ") == 2
    assert "(process 0)" not in line
    assert found(record, "train and resume")[0][1] == OK
    ((_, status, line),) = found(record, "hosts")
    assert status == FAIL and line.startswith("orbax-checkpoint is 0.1 in process 1, 0.")
    wrong = [finding for finding in record["findings"] if finding["status"] == FAIL]
    first, second = (device["device"] for device in record["rates"]["devices"][2:])
    assert len(wrong) == 3, wrong
    (_, here, _), (process, there, line) = found(record, "exact products")
    assert (here, process, there) == (OK, 1, FAIL)
    assert line.startswith(f"process 1 on {socket.gethostname()}: off, of the largest number: ")
    assert f"float32 on device {first} by 0.1, float32 on device {second} by 0.1" in line
    assert len(record["rates"]["devices"]) == 4
    assert record["rates"]["collectives"]["all_reduce"] > 0
    assert "collectives of all hosts" not in record["rates"]
    assert found(record, "collectives")[0][2].endswith(
        " from each of 4 devices; no data sheet of cpu"
    )
    assert len(record["run"]["write_bytes_per_s"]) == 2
    assert list(tmp_path.iterdir()) == []


# --- kernels


def wrong_by_a_percent(x):
    return 1.01 * x


def wrong_gradient(x):
    """The same number, with 1.01 times its gradient."""
    return x + 0.01 * (x - jax.lax.stop_gradient(x))


def not_a_number(x):
    return x.at[0, 0, 0].set(jnp.nan)


def raises(x):
    raise NotImplementedError("no such kernel on this chip")


@pytest.mark.parametrize("fault", [wrong_by_a_percent, wrong_gradient, not_a_number, raises])
def test_a_kernel_that_returns_wrong_numbers(fault, monkeypatch):
    """It alone is named."""

    class Faulty(dispatch.Slots):
        def combine(self, y_ExRxD):
            return fault(super().combine(y_ExRxD))

    monkeypatch.setitem(dispatch.BACKENDS, "gather", (Faulty, None))
    chosen, every = {"dispatch einsum", "dispatch gather"}, kernels.cases

    def cases(devices):
        for case in every(devices):
            if case.name in chosen:
                yield case._replace(dtypes=("float32",))

    monkeypatch.setattr(kernels, "cases", cases)
    einsum, wrong, exchanges = kernels.check().findings
    assert (einsum.name, einsum.status) == ("dispatch einsum", OK)
    assert (wrong.name, wrong.status) == ("dispatch gather", FAIL)
    assert wrong.fix.startswith("use another execution.dispatch; report it")
    expected = {
        wrong_by_a_percent: "wrong numbers: float32 forward 1e-02",
        wrong_gradient: "backward 1e-02 of 1e-04",
        not_a_number: "wrong numbers: float32 forward nan",
        raises: "cannot run: internal error: NotImplementedError: no such kernel on this chip",
    }
    assert expected[fault] in wrong.line
    assert exchanges.line.startswith("not run: they need several devices")


# --- drivers


def machine(root, *files):
    """The files by which a kernel shows its devices."""
    for name, content in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def pci(vendor, device, kind):
    folder = "sys/bus/pci/devices/0000:00:05.0"
    return [
        (f"{folder}/{n}", t)
        for n, t in zip(("vendor", "device", "class"), (vendor, device, kind), strict=True)
    ]


DRIVER = (
    "proc/driver/nvidia/version",
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 2021\n",
)
H100 = pci("0x10de\n", "0x2330\n", "0x030200\n")
V5E, NETWORK = pci("0x1ae0", "0x0063", "0x120000"), pci("0x1ae0", "0x0042", "0x020000")


@pytest.mark.parametrize(
    ("files", "installed", "variable", "line", "fix"),
    [
        ([("dev/nvidia0", "")], [], "", "has a GPU (", 'pip install -U "jax[cuda12]"'),
        (H100, [], "", "has a GPU (", "install NVIDIA's driver, until nvidia-smi lists the GPU"),
        ([*H100, DRIVER], [], "", "has a GPU (", 'pip install -U "jax[cuda12]"'),
        ([DRIVER, ("dev/nvidia0", "")], [], "cpu", "has a GPU (", "unset JAX_PLATFORMS, which"),
        (
            [("dev/nvidia0", "")],
            ["jax-cuda12-plugin"],
            "",
            "has a GPU (",
            "JAX's package for it is installed: see the reason",
        ),
        (V5E, [], "", "has a TPU (", 'pip install -U "jax[tpu]"'),
        ([("dev/accel0", "")], ["libtpu"], "", "has a TPU (", "JAX_PLATFORMS=tpu python -c"),
        (NETWORK, [], "", "", ""),
        # WSL2 has it for GPUs of all makers, and the library for NVIDIA's.
        ([("dev/dxg", "")], [], "", "", ""),
        (
            [("dev/dxg", ""), ("usr/lib/wsl/lib/libcuda.so.1", "")],
            [],
            "",
            "has a GPU (",
            'pip install -U "jax[cuda12]"',
        ),
    ],
)
def test_a_missing_driver(files, installed, variable, line, fix, tmp_path, monkeypatch):
    machine(tmp_path, *files)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if variable:
        monkeypatch.setenv("JAX_PLATFORMS", variable)
    version = environment.installed_version
    accelerators = {*environment.RECORDED}
    monkeypatch.setattr(
        environment,
        "installed_version",
        lambda name: (
            version(name) if name not in accelerators else name in installed and "1" or None
        ),
    )
    devices = next(f for f in environment.check().findings if f.name == "devices")
    assert devices.status == (FAIL if line else OK)
    assert line in devices.line
    assert fix in devices.fix


OPEN_DRIVER = (
    "proc/driver/nvidia/version",
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  470.82.01  Release Build\n",
)


@pytest.mark.parametrize("driver", [DRIVER, OPEN_DRIVER])
def test_an_old_driver(driver, tmp_path, monkeypatch):
    machine(tmp_path, driver)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "installed_version", {"jax-cuda12-plugin": "0.10.2"}.get)
    (finding,) = environment._drivers("gpu", {"backend": "cuda 12090"})
    assert finding.line == "NVIDIA's driver is 470.82.01, jax-cuda12-plugin needs 525 or newer"
    assert finding.fix == "install a newer driver"


def test_no_device_at_all(monkeypatch, capsys):
    """Nothing else can run then."""

    def devices():
        raise RuntimeError("Unable to initialize backend 'tpu': it is in use by process 17")

    monkeypatch.setattr(jax, "devices", devices)
    assert main(["check"]) == 1
    out, err = capsys.readouterr()
    assert "  environment: devices: JAX finds no device (Unable to initialize backend 'tpu'" in out
    assert err.splitlines()[-1].startswith("prmoe: 1 of 1 findings are wrong")


# --- the workdir


def only_the_run(monkeypatch):
    """The other parts have tests of their own."""
    for part in (kernels, rates):
        monkeypatch.setattr(part, "check", lambda: Part([], {}))


@pytest.mark.parametrize(
    ("place", "reason"),
    [("file/runs", "Not a directory"), ("file", "Not a directory"), ("/proc/runs", "No such file")],
)
def test_a_workdir_that_cannot_be_written(place, reason, tmp_path, monkeypatch, capsys):
    only_the_run(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert main(["check", f"--workdir={place}"]) == 1
    out, err = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if line.startswith("  run: workdir: ")]
    assert f"{place} cannot be written: {reason}" in line
    assert "give --workdir a folder that this user may write" in line
    assert err.splitlines()[-1].startswith("prmoe: 1 of ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk(tmp_path, monkeypatch):
    """It is found by the file that is written, before a run starts."""

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trial, "_write_and_read", full)
    (finding,) = trial.check(tmp_path / "runs").findings
    assert finding.line == f"{tmp_path}/runs cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == []


@needs_extra("gcs", "gcsfs")
def test_a_store(object_store, monkeypatch):
    """A read-only one is named; in another one a run leaves nothing behind."""
    monkeypatch.setattr(trial, "FILE_BYTES", 1 << 16)
    workdir = stores.as_path("gs://bucket/checked")
    object_store.fail(read_only=True)
    try:
        (finding,) = trial.check(workdir).findings
    finally:
        object_store.fail()
    assert (finding.name, finding.status) == ("workdir", FAIL)
    assert "gs://bucket/checked cannot be written: permission denied (" in finding.line
    part = trial.check(workdir)
    assert [finding.status for finding in part.findings] == [OK, OK, OK], table(part.findings)
    assert list(workdir.parent.glob("checked/*")) == []


def run_of(losses):
    """Stands for training: its checkpoints, and the losses of the steps that it makes."""

    def train(config, workdir, on_metrics):
        for step, loss in next(losses):
            (workdir / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
            on_metrics({"step": step, "loss": loss, "grad_norm": 1.0})

    return train


WHOLE = [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0)]


@pytest.mark.parametrize(
    ("resumed", "status", "line"),
    [
        (WHOLE[2:], OK, "again from step 2: the same bit for bit"),
        (
            [(3, 3.0000000000000004), (4, 2.0)],
            FAIL,
            "loss at step 3 is 3.0000000000000004, and was",
        ),
        (WHOLE, FAIL, "steps [1, 2, 3, 4] were resumed, not those after 2"),
        (WHOLE[3:], FAIL, "steps [4] were resumed, not those after 2"),
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(resumed, status, line, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "train", run_of(iter([WHOLE, resumed])))
    (finding,) = trial._run(None, tmp_path)
    assert finding.status == status
    assert line in finding.line
    assert not (tmp_path / "checkpoints" / "4").exists() or resumed[-1][0] == 4


@pytest.mark.parametrize(
    ("flags", "loss", "status"),
    [("", 3.001, WARN), ("", 3.1, FAIL), ("--xla_gpu_deterministic_ops=true", 3.001, FAIL)],
)
def test_a_gpu_may_sum_in_any_order(flags, loss, status, tmp_path, monkeypatch):
    """Unless a flag of XLA keeps it from doing so."""
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(trial, "train", run_of(iter([WHOLE, [(3, loss), (4, 2.0)]])))
    (finding,) = trial._run(None, tmp_path)
    assert finding.status == status
    assert f"loss at step 3 is {loss}, and was 3.0" in finding.line
    assert (finding.fix == "set XLA_FLAGS=--xla_gpu_deterministic_ops=true") == (not flags)


@pytest.mark.parametrize(
    ("platform", "variable", "pool", "status", "gibibytes"),
    [
        ("gpu", "", 60, OK, 60),
        ("gpu", "", 20, FAIL, 20),  # another program holds the rest
        ("gpu", "false", 0, OK, 60),  # JAX takes memory when it needs it
        ("gpu", "", None, OK, 60),
        ("tpu", "", 20, OK, 60),
    ],
)
def test_memory_that_another_program_holds(
    platform, variable, pool, status, gibibytes, monkeypatch
):
    stats = {"bytes_limit": 60 << 30, "pool_bytes": pool and pool << 30}
    kind = "NVIDIA H100 80GB HBM3"
    device = SimpleNamespace(id=0, platform=platform, device_kind=kind, memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "device_put", lambda x, device: x)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", variable or "true")
    numbers = {}
    finding = environment._memory([device], numbers)
    assert finding.status == status
    assert numbers["device_memory_bytes"] == [gibibytes << 30]
    assert f"{gibibytes}.0 " in finding.line


# --- data sheets, corpus, benchmarks


def test_slow_by_hand():
    assert slow({"a": 10.0, "b": 10.0, "c": 7.9}, 0.8) == {"c": 0.79}
    assert slow({"a": 10.0, "b": 10.0, "c": 8.0}, 0.8) == {}
    assert slow({}, 0.8) == {}


def of_card(**values):
    rated = {"matmul_bfloat16": 6e14, "matmul_float32": 4e14, "memory": 3e12} | values
    return {("host (process 0)", 0): rated}


@pytest.mark.parametrize(
    ("kind", "values", "status", "line"),
    [
        ("matmul_bfloat16", {}, OK, "600 TFLOP/s, 61% of the data sheet's 989 TFLOP/s"),
        (
            "matmul_bfloat16",
            {"matmul_bfloat16": 3e14},
            FAIL,
            "300 TFLOP/s, 30% of the data sheet's 989 TFLOP/s, where 50% is the least",
        ),
        ("matmul_float32", {}, OK, "400 TFLOP/s"),
        ("memory", {}, OK, "3 TB/s, 90% of the data sheet's 3.35 TB/s"),
    ],
)
def test_rates_beside_the_data_sheet(kind, values, status, line):
    finding = rates._judge(of_card(**values), kind, "NVIDIA H100 80GB HBM3")
    assert (finding.status, finding.line) == (status, line)


def test_links_beside_the_data_sheet():
    devices = [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3") for _ in range(8)]
    fast = {"all_to_all": 2e11, "all_reduce": 3e11}
    slowly = {"all_to_all": 2e10, "all_reduce": 2.4e10}
    inside = rates._judge_collectives("collectives", fast, [], devices[:4], 1)
    assert inside.status == OK
    assert inside.line.endswith("4 devices; one link has 450 GB/s by the data sheet")
    pcie = rates._judge_collectives("collectives", slowly, [], devices[:4], 1)
    assert pcie.status == FAIL and "nvidia-smi topo -m" in pcie.fix
    between = rates._judge_collectives("collectives of all hosts", slowly, [], devices, 2)
    assert between.status == OK and "one network has 50 GB/s" in between.line


def test_the_corpus_is_read_as_fast_as_a_step_needs(text, monkeypatch):
    monkeypatch.setattr(corpus, "SECONDS", 0.1)
    folder, cache = text
    config = tiny_config(
        f"data.corpus={folder}",
        f"data.cache_dir={cache}",
        "data.tokenizer=bytes",
        "model.length=32",
        "train.batch_size=4",
    )
    (enough,) = corpus.check(config, [1e6]).findings
    assert enough.status == OK
    part = corpus.check(config, [1e18, 1e18])
    (starved,) = part.findings
    assert starved.status == FAIL and starved.fix.startswith("put data.cache_dir on a local disk")
    flops = part.numbers["needed_tokens_per_s"]
    assert flops == pytest.approx(1e18 / run_flops(config))
    monkeypatch.setattr("jax.device_count", lambda: 4)
    uneven = dataclasses.replace(config.train, batch_size=6)
    config = dataclasses.replace(config, train=uneven, mesh=MeshConfig(data=4))
    with pytest.raises(UserError, match="train.batch_size=6 is not divisible by 4 devices"):
        corpus.check(config, [1e6])


def run_flops(config):
    from prmoe_jax.model.sizes import cost

    return cost(config.model).train_flops_per_token


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_benchmarks_of_a_card(platform, monkeypatch):
    """Their config is valid, and none starts when time is up."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    names = ["bench moe", "bench step", "bench decode"]
    assert list(benchmarks._benchmarks(None)) == names
    part = benchmarks.check(None, -1e9, pytest.fail)
    assert [(f.name, f.status) for f in part.findings] == [(name, WARN) for name in names]
    assert part.numbers == {}


def test_a_benchmark_that_fails_leaves_the_others(monkeypatch):
    """That one refuses the config is no fault of the machine."""

    def fails(error):
        def run():
            raise error

        return run, str

    rows = [{"median_s": 1.0}]
    ran = {"a": fails(MemoryError("7 GB")), "b": (lambda: rows, lambda rows: "table")}
    ran["c"] = fails(UserError("no such config"))
    monkeypatch.setattr(benchmarks, "_benchmarks", lambda config: ran)
    told = []
    part = benchmarks.check(None, float("inf"), told.append)
    assert [(f.name, f.status) for f in part.findings] == [("a", FAIL), ("b", OK), ("c", WARN)]
    assert (part.numbers, told) == ({"b": rows}, ["table\n"])


def test_processes_that_find_something_are_named(monkeypatch):
    """Each finding is shown once, with all of them and their hosts, unless all have found it."""
    old, slow, fine = (Finding(name, FAIL, f"{name}.", "mend it") for name in ("old", "slow", "x"))
    fine = fine._replace(status=OK)
    gathered = [("a", [fine, slow]), ("b", [slow, old]), ("b", [slow, old, fine]), ("c", [slow])]
    monkeypatch.setattr(run.processes, "gathered", lambda own: gathered)
    record, told = {"findings": [], "environment": {"backend": "cpu"}}, []
    run._add(record, "rates", Part([fine, slow], {}), told.append)
    assert run.wrong(record) == [
        "rates: slow: slow.; mend it",
        "rates: old: process 1, 2 on b: old.; mend it",
    ]
    assert [found["name"] for found in record["findings"]] == ["x", "slow", "old"]
    assert "process 1, 2 on b: old." in told[0]


def test_a_slow_store_does_not_keep_the_run_from_being_made(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "FILE_BYTES", 1 << 16)
    monkeypatch.setattr(trial, "slow_processes", lambda *_: "process 0 1 B/s")
    monkeypatch.setattr(trial, "train", run_of(iter([WHOLE, WHOLE[2:]])))
    found = trial.check(tmp_path).findings
    assert [finding.status for finding in found] == [FAIL, FAIL, OK], table(found)


def test_a_fix_stands_below_its_line():
    findings = [Finding("a", OK, "1"), Finding("bc", FAIL, "2", "do [this]")]
    assert table(findings).splitlines() == [
        "ok    a   1",
        "fail  bc  2",
        "      fix: do [this]",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir="], "argument --workdir: is empty"),
        (["--config=tony:prmoe"], "--config=tony is neither a file nor one of the configs"),
        ([f"--config={tiny.__file__}:prmoe", "--config.seed=x"], "--config.seed=x must be"),
        (["--workdir=s3://bucket/x"], "there is no store s3://"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_unforeseen_error_of_a_part_is_a_finding(monkeypatch):
    def broken():
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(rates, "check", broken)
    part = run._run("rates", rates.check)
    assert part.findings[0].line == "internal error: ZeroDivisionError: division by zero"
