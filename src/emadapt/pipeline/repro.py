"""Run the pipeline with independent stages side by side. `dvc repro` alone is serial.

One `dvc --wait-for-lock repro --single-item STAGE` per stage, started when the stages that it needs are done: the one
parallel use of DVC that holds up (without the waiting, and without single items, its lock makes runs fail).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from emadapt.errors import EmadaptError
from emadapt.study.study import load_study
from emadapt.training.launch import visible

LOGS = "scratch/repro"

Submit = Callable[[str, list[str]], Future[tuple[bool, str]]]


def run_pipeline(jobs: int, gpus: list[str]) -> int:
    """Run all stages that are out of date, `jobs` at a time.

    Args:
        jobs: stages that run at once; the CPU's cores are shared out among them.
        gpus: devices (see `emadapt.training.launch`) that the stages get, see `place`; empty: leave the choice to them.

    Returns:
        0, or 1 if a stage failed. Stages that do not need the failed one are finished first.

    Raises:
        EmadaptError: another one is at work in this checkout, or the pipeline cannot be read.
    """
    with _alone():
        return _run_pipeline(jobs, gpus)


@contextmanager
def _alone() -> Iterator[None]:
    """Holds the checkout's lock, which the kernel takes back however this process ends."""
    os.makedirs(LOGS, exist_ok=True)
    lock = FileLock(f"{LOGS}/lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise EmadaptError(
            "another `emadapt repro` is at work in this checkout; wait for it, or use a clone"
        ) from None
    with lock:
        yield


def _run_pipeline(jobs: int, gpus: list[str]) -> int:
    if not (needs := stage_graph()):
        print("repro: every stage is up to date")
        return 0
    slots = [gpus[i % len(gpus)] if gpus else "" for i in range(max(jobs, len(gpus)))]
    with _children() as children, ThreadPoolExecutor(jobs) as pool:

        def submit(stage: str, devices: list[str]) -> Future[tuple[bool, str]]:
            threads = (
                max(1, len(os.sched_getaffinity(0)) * len(devices) // len(slots)) if jobs > 1 else 0
            )
            return pool.submit(_run_stage, stage, devices, threads, children)

        several = useful_devices() if len(gpus) >= jobs else {}  # not where GPUs are shared
        return _schedule(needs, slots, jobs, several, submit)


def useful_devices() -> dict[str, int]:
    """Stages that more than one device is of use to, with how many: units train on one for each sample of a batch."""
    study = load_study()
    batch = {
        u: max(study.train_settings(u).batch, len(study.train_set_settings[u.train_set].datasets))
        for u in study.units()
        if not (
            study.regime_settings[u.regime].align or study.regime_settings[u.regime].interpolated
        )
    }
    return {f"train@{unit.name}": n for unit, n in batch.items()}


def place(
    ready: Sequence[str], free: Sequence[str], room: int, useful: Mapping[str, int]
) -> dict[str, list[str]]:
    """Which stages start now, and on which devices: one each, and what is left over in turn to those that it is of use to.

    Args:
        ready: stages that wait for nothing but a device, first come first served.
        free: devices; a name stands here as often as stages may have it at once.
        room: how many stages may start.
        useful: how many devices a stage can use, where that is more than one.

    Returns:
        The devices of each stage that starts, no GPU twice for one of them.
    """
    placed = {stage: [device] for stage, device in zip(ready[:room], free, strict=False)}
    for device in free[len(placed) :]:
        takers = [
            s
            for s, own in placed.items()
            if len(own) < useful.get(s, 1) and (device == "cpu" or device not in own)
        ]
        if takers:
            placed[min(takers, key=lambda stage: len(placed[stage]))].append(device)
    return placed


def stage_graph() -> dict[str, set[str]]:
    """Every stage of dvc.yaml that is out of date, or needs one that is, with those of them that it needs.

    DVC looks at all of them in one go here. Asking stage by stage whether it is up to date takes a second each.

    Raises:
        EmadaptError: DVC cannot read the pipeline, or data/ is not what data.dvc records: DVC would silently take edited
            data as its new version.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            stale = set(repo.status())
            if "data.dvc" in stale:
                keep, undo = "dvc add data", "dvc checkout --force data.dvc"
                raise EmadaptError(
                    f"data: not what data.dvc records; keep the change with `{keep}`, or undo it with `{undo}`"
                )
            graph = repo.index.graph
            stages = {s: s.addressing for s in graph.nodes if getattr(s, "cmd", None)}
            needs = {
                name: {stages[n] for n in graph.successors(s) if n in stages}
                for s, name in stages.items()
            }
    except DvcException as error:
        raise EmadaptError(f"dvc.yaml: {error}") from error
    while more := {name for name, own in needs.items() if own & stale} - stale:
        stale |= more
    return {name: own & stale for name, own in needs.items() if name in stale}


def _schedule(
    needs: dict[str, set[str]], slots: list[str], jobs: int, useful: dict[str, int], submit: Submit
) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    done: set[str] = set()
    failed: set[str] = set()
    running: dict[Future[tuple[bool, str]], str] = {}
    free, has = list(slots), dict[str, list[str]]()
    columns = (
        TextColumn("repro"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("", total=len(needs), now="")
        while True:
            waiting = [s for s in needs if s not in done | failed and s not in running.values()]
            has |= (
                placed := place(
                    [s for s in waiting if needs[s] <= done], free, jobs - len(running), useful
                )
            )
            for device in (d for devices in placed.values() for d in devices):
                free.remove(device)
            running |= {submit(stage, devices): stage for stage, devices in placed.items()}
            if not running:
                break
            bar.update(task, now=", ".join(sorted(running.values())[:2]))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stage = running.pop(future)
                free += has[stage]
                ok, words = future.result()
                (done if ok else failed).add(stage)
                bar.console.print(words, markup=False, highlight=False)
                bar.update(task, completed=len(done))
    skipped = sorted(set(needs) - done - failed)
    if failed:
        unrun = ", ".join(skipped) or "none"
        print(
            f"repro: failed: {', '.join(sorted(failed))}; not run for want of them: {unrun}",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _run_stage(
    stage: str, devices: list[str], threads: int, children: set[subprocess.Popen[str]]
) -> tuple[bool, str]:
    """One stage in a process group of its own, its output kept in a log; the closing line says how it went."""
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if any(devices):
        environment |= {"EMADAPT_DEVICES": ",".join(devices), **visible(devices)}
    started, log = time.monotonic(), os.path.join(LOGS, f"{stage.replace('/', '_')}.log")
    with open(log, "w") as out:
        command = ["dvc", "--wait-for-lock", "repro", "--single-item", stage]
        child = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        children.add(child)
        code = child.wait()
        children.discard(child)
    text = Path(log).read_text()
    if code:
        return (
            False,
            f"{stage}: failed after {time.monotonic() - started:.0f} s; {log} ends with\n{_tail(text)}",
        )
    return (
        True,
        f"{stage}: {'up to date' if 'Running stage' not in text else f'{time.monotonic() - started:.0f} s'}",
    )


def _tail(text: str, lines: int = 15) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:])


@contextmanager
def _children() -> Iterator[set[subprocess.Popen[str]]]:
    """The stages' processes; ended with all their descendants when this process is told to stop."""
    children: set[subprocess.Popen[str]] = set()

    def stop(number: int, frame: object) -> None:
        for child in list(children):
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
        print("repro: stopped; run it again to go on", file=sys.stderr)
        os._exit(128 + number)

    if threading.current_thread() is threading.main_thread():
        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield children
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
