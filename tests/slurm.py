"""A stand-in for SLURM on one machine: sbatch, scontrol requeue and scancel as far as docs/clusters.md uses them.

`install` puts them on PATH. A job is a process of its own that waits for its dependencies, runs its tasks side by side, and
writes how it ended; `near_limit` sends the signal that --signal asks for. What SLURM would refuse is refused: options that it
does not have, or values of another form.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

DEPENDENCY = r"singleton|(after|afterok|afterany):\d+(:\d+)*"
OPTIONS = {
    "array": r"\d+-\d+(%\d+)?",
    "cpus-per-task": r"\d+",
    "dependency": DEPENDENCY,
    "gpus": r"\d+",
    "gpus-per-node": r"\d+",
    "job-name": r"[\w-]+",
    "mem": r"\d+[MG]",
    "nodes": r"\d+",
    "open-mode": "append|truncate",
    "output": r"[\w./%-]+",
    "parsable": "",
    "requeue": "",
    "signal": r"B:(USR1|TERM)@\d+",
    "time": r"(\d+-)?\d\d:\d\d:\d\d",
}
NO_CARRY = ("SLURM_", "SBATCH_")


class SlurmError(Exception):
    """What sbatch would refuse."""


def parse(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Long options of the form --name=value or --name, and the words after them."""
    options: dict[str, str] = {}
    for i, word in enumerate(words):
        if not word.startswith("--"):
            return options, words[i:]
        name, _, value = word[2:].partition("=")
        if name not in OPTIONS:
            raise SlurmError(f"sbatch: unrecognized option '--{name}'")
        if not re.fullmatch(OPTIONS[name], value):
            raise SlurmError(f"sbatch: error: invalid value '{value}' for --{name}")
        options[name] = value
    return options, []


def directives(text: str) -> dict[str, str]:
    """The #SBATCH lines of a script, which end at its first command."""
    lines = text.splitlines()
    if not lines or not lines[0].startswith("#!"):
        raise SlurmError(
            "sbatch: error: This does not look like a batch script: its first line must start with #!"
        )
    options: dict[str, str] = {}
    for n, line in enumerate(lines):
        if line.startswith("#SBATCH"):
            options |= parse(shlex.split(line.removeprefix("#SBATCH"), comments=True))[0]
        elif line.strip() and not line.startswith("#"):
            if late := [other for other in lines[n:] if other.startswith("#SBATCH")]:
                raise SlurmError(f"sbatch ignores, since it comes after a command: {late[0]}")
            break
    return options


def install(folder: Path) -> dict[str, str]:
    """The environment in which `sbatch` and its like are these."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name in ("sbatch", "scontrol", "scancel"):
        (programs / name).write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n'
        )
        (programs / name).chmod(0o755)
    folder.chmod(0o755)
    return {"FAKE_SLURM": str(folder), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}


def jobs(folder: Path) -> dict[int, dict[str, Any]]:
    """All jobs: name, state (PENDING, RUNNING, COMPLETED, FAILED), exit codes and restarts of the tasks."""
    return {int(p.stem): json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}


def wait(folder: Path, seconds: float) -> dict[int, dict[str, Any]]:
    """All jobs once they have ended."""
    deadline = time.monotonic() + seconds
    while any(j["state"] in ("PENDING", "RUNNING") for j in jobs(folder).values()):
        assert time.monotonic() < deadline, f"jobs did not end: {jobs(folder)}"
        time.sleep(0.2)
    return jobs(folder)


def end(folder: Path) -> None:
    """Nothing of any job is left afterwards, also where a test has failed."""
    runners = [
        own["runner"] for own in jobs(folder).values() if own["state"] in ("PENDING", "RUNNING")
    ]
    shells = [int(shell.read_text()) for shell in folder.glob("shell-*")]
    for pid in [*runners, *shells, *(child for shell in shells for child in _descendants(shell))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def near_limit(folder: Path) -> None:
    """As if the time limit of all that runs were near: the script of each task, and nothing else, gets its job's signal."""
    for shell in folder.glob("shell-*"):
        options = jobs(folder)[int(shell.name.removeprefix("shell-")[:3])]["options"]
        if "signal" in options:
            os.kill(
                int(shell.read_text()),
                signal.Signals["SIG" + options["signal"].removeprefix("B:").split("@")[0]],
            )


# -- what the programs do


def sbatch(folder: Path, words: list[str]) -> None:
    options, rest = parse(words)
    text = Path(rest[0]).read_text()
    options = directives(text) | options
    if "output" in options and not Path(options["output"]).parent.is_dir():
        raise SlurmError(
            f"sbatch: {Path(options['output']).parent} is not there: the job would fail without a word"
        )
    number = 1 + max(jobs(folder), default=100)
    job = {
        "name": options.get("job-name", rest[0]),
        "options": options,
        "words": rest[1:],
        "state": "PENDING",
        "codes": {},
        "restarts": {},
    }
    (folder / f"{number}.sh").write_text(text)
    (folder / f"{number}.sh").chmod(0o755)
    _write(folder, number, job)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(NO_CARRY)}
    runner = subprocess.Popen(
        [sys.executable, __file__, "job", str(number)],
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _write(folder, number, {"runner": runner.pid})
    print(number if "parsable" in options else f"Submitted batch job {number}")


def scontrol(folder: Path, words: list[str]) -> None:
    what, task = words
    if what != "requeue":
        raise SlurmError(f"scontrol: no {what} here")
    (folder / f"requeue-{task}").touch()


def scancel(folder: Path, words: list[str]) -> None:
    """SIGTERM for every process of a job; the scripts of docs/clusters.md have one task where they are cancelled."""
    for shell in folder.glob(f"shell-{words[0]}*"):
        for pid in [int(shell.read_text()), *_descendants(int(shell.read_text()))]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM)


def job(folder: Path, number: int) -> None:
    own = jobs(folder)[number]
    options = own["options"]
    if not _depend(folder, number, options.get("dependency", "")):
        _write(folder, number, {"state": "FAILED", "codes": {"dependency": 1}})
        return
    _write(folder, number, {"state": "RUNNING"})
    first, last, most = re.fullmatch(r"(\d+)-(\d+)%?(\d+)?", options.get("array", "0-0")).groups()  # type: ignore[union-attr]
    tasks = range(int(first), int(last) + 1)
    with ThreadPoolExecutor(int(most or len(tasks))) as pool:
        ended = list(pool.map(lambda task: _task(folder, number, own, task), tasks))
    state = "COMPLETED" if all(code == 0 for code, _ in ended) else "FAILED"
    codes, restarts = ({str(t): e[i] for t, e in zip(tasks, ended, strict=True)} for i in (0, 1))
    _write(folder, number, {"state": state, "codes": codes, "restarts": restarts})


def _task(folder: Path, number: int, own: dict[str, Any], task: int) -> tuple[int, int]:
    """Runs a task, again as often as it is requeued; its last exit code and how often it was."""
    options, array = own["options"], "array" in own["options"]
    name = (
        f"{number}{task:03d}" if array else str(number)
    )  # SLURM_JOB_ID of a task differs from that of its array
    environment = os.environ | {
        "SLURM_JOB_ID": name,
        "SLURM_JOB_NAME": own["name"],
        "SLURM_SUBMIT_DIR": os.getcwd(),
        "SLURMD_NODENAME": "localhost",
        "TMPDIR": "/tmp",
    }
    if array:
        environment |= {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(task)}
    if "cpus-per-task" in options:
        environment["SLURM_CPUS_PER_TASK"] = "1"  # what this machine can give
    gpus = int(options.get("gpus", options.get("gpus-per-node", 0)))
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(
            ["cpu"] * gpus
        )  # what emadapt calls the devices of a node without
    restarts = 0
    while True:
        environment["SLURM_RESTART_COUNT"] = str(restarts)
        log = (
            options.get("output", "slurm-%j.out")
            .replace("%x", own["name"])
            .replace("%A", str(number))
        )
        log = log.replace("%a", str(task)).replace("%j", name)
        with open(log, "ab" if restarts else "wb") as out:
            command = ["bash", str(folder / f"{number}.sh"), *own["words"]]
            job_name, _, user_name = os.environ.get("FAKE_SLURM_USER", "").partition("=")
            user = user_name if job_name == own["name"] else None
            shell = subprocess.Popen(
                command,
                env=environment,
                user=user,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            (folder / f"shell-{name}").write_text(str(shell.pid))
            code = shell.wait()
        (folder / f"shell-{name}").unlink()
        requeued = folder / f"requeue-{name}"
        if not requeued.exists():
            return code, restarts
        requeued.unlink()
        restarts += 1


def _depend(folder: Path, number: int, dependency: str) -> bool:
    """Waits as --dependency says; False if it can never be met."""
    if ":" not in dependency:
        return True
    kind, *others = dependency.split(":")
    ends = {
        "after": {"RUNNING", "COMPLETED", "FAILED"},
        "afterok": {"COMPLETED"},
        "afterany": {"COMPLETED", "FAILED"},
    }[kind]
    while True:
        states = {jobs(folder)[int(other)]["state"] for other in others}
        if states <= ends:
            return True
        if kind == "afterok" and "FAILED" in states:
            return False
        time.sleep(0.1)


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    own = [int(child) for child in children.read_text().split()] if children.exists() else []
    return own + [grandchild for child in own for grandchild in _descendants(child)]


def _write(folder: Path, number: int, changes: dict[str, Any]) -> None:
    import fcntl

    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / f"{number}.json"
        now = json.loads(file.read_text()) if file.exists() else {}
        (folder / "new").write_text(json.dumps(now | changes))
        (folder / "new").replace(file)


if __name__ == "__main__":
    place = Path(os.environ["FAKE_SLURM"])
    try:
        if sys.argv[1] == "job":
            job(place, int(sys.argv[2]))
        else:
            {"sbatch": sbatch, "scontrol": scontrol, "scancel": scancel}[sys.argv[1]](
                place, sys.argv[2:]
            )
    except SlurmError as error:
        sys.exit(str(error))
