"""`prmoe check`: runs its parts one after the other, in one or more processes."""

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

import jax

from prmoe_jax.check import benchmarks, corpus, environment, kernels, rates, trial
from prmoe_jax.check.findings import FAIL, OK, Finding, Part, table
from prmoe_jax.config.schema import Config
from prmoe_jax.errors.ending import describe
from prmoe_jax.parallel import processes
from prmoe_jax.run.directory import versions

log = logging.getLogger(__name__)


def check(
    workdir: Path,
    config: Config | None = None,
    bench: bool = False,
    tell: Callable[[str], None] = print,
) -> dict:
    """Runs all parts, in all processes of the run if there are several.

    Args:
      workdir: the folder, local or in an object store, in which a tiny run is trained. All that is
        made there is removed.
      config: the experiment whose corpus is read and which is benchmarked. By default no corpus is
        read, and a small PR-MoE is benchmarked.
      bench: whether to run `prmoe bench moe`, `step` and `decode` as well, on process 0.
      tell: called with the lines of each part when it ends, by process 0.

    Returns:
      The record. `findings` is a list of dicts with part, process, name, status (ok, warn or fail),
      line and fix. Each part's name has the part's numbers; `bench` has the rows of each benchmark.
      `seconds` is the duration. Other processes' findings are left out if they are ok.
    """
    begun = time.perf_counter()
    record: dict = {"findings": []}
    parts: dict[str, Callable[[], Part]] = {
        "environment": environment.check,
        "hosts": hosts,
        "kernels": kernels.check,
        "rates": rates.check,
        "run": lambda: trial.check(workdir),
    }
    if config:
        rate = f"matmul_{config.model.dtype}"
        parts["corpus"] = lambda: corpus.check(
            config, [device[rate] for device in record["rates"].get("devices", [])]
        )
    if bench:
        parts["bench"] = lambda: benchmarks.check(config, begun, tell)
    for name, part in parts.items():
        log.info("checking: %s", name)
        _add(record, name, _run(name, part), tell)
        if "backend" not in record["environment"]:  # JAX has no device
            break
    record["seconds"] = time.perf_counter() - begun
    return record


def wrong(record: dict) -> list[str]:
    """The failures of a check, one line each, with the fix."""
    return [
        f"{found['part']}: {found['name']}: {found['line']}{found['fix'] and '; '}{found['fix']}"
        for found in record["findings"]
        if found["status"] == FAIL
    ]


def _run(name: str, part: Callable[[], Part]) -> Part:
    """Runs a part. An error is a finding; it is raised if other processes wait for this one."""
    try:
        return part()
    except Exception as error:
        if name not in ("environment", "kernels") and jax.process_count() > 1:
            raise
        failure = describe(error)
        fix = "" if failure.foreseen else "report it with the versions above"
        return Part([Finding(name, FAIL, failure.line, fix)], {})


def _add(record: dict, name: str, found: Part, tell: Callable[[str], None]) -> None:
    """Adds a part's numbers and all processes' findings to the record; process 0 tells them."""
    record[name] = found.numbers
    own, gathered = 0, [(socket.gethostname(), found.findings)]
    if "backend" in record["environment"]:
        own, gathered = jax.process_index(), processes.gathered(gathered[0])
    names = [host for host, _ in gathered]
    every = [[Finding(*finding) for finding in theirs] for _, theirs in gathered]
    shown = []
    for process, findings in enumerate(every):
        for finding in findings:
            where = [p for p, theirs in enumerate(every) if finding in theirs]
            # Other processes' ok findings are left out. A finding of several is shown once.
            if process != (own if finding.status == OK else where[0]):
                continue
            if finding.status != OK and len(where) < len(gathered):
                on = ", ".join(dict.fromkeys(names[p] for p in where))
                line = f"process {', '.join(map(str, where))} on {on}: {finding.line}"
                finding = finding._replace(line=line)
            shown.append(finding)
            record["findings"].append({"part": name, "process": process} | finding._asdict())
    if own == 0 and shown:
        tell(f"{name}\n{table(shown)}\n")


def hosts() -> Part:
    """Compares the processes' code, versions and devices."""
    if jax.process_count() == 1:
        return Part([], {})
    devices = jax.local_devices()
    ours = versions() | {"device": devices[0].device_kind, "devices": len(devices)}
    gathered = processes.gathered(ours)
    names = processes.gathered(socket.gethostname())
    differing = [
        f"{name} is {theirs[name]} in process {process}, {gathered[0][name]} in process 0"
        for process, theirs in enumerate(gathered)
        for name in ours
        if theirs[name] != gathered[0][name]
    ]
    same = "the same code and versions everywhere"
    finding = Finding("hosts", OK, f"{len(names)} processes on {len(set(names))} hosts, {same}")
    if differing:
        finding = Finding("hosts", FAIL, "; ".join(differing), f"install {same}")
    return Part([finding], {"names": names})
