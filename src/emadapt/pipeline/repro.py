"""Run the pipeline with independent stages at the same time. `dvc repro` runs one after the other.

Each stage is one `dvc --wait-for-lock repro --single-item STAGE`, started when the stages that it
needs are done. Other ways to run DVC in parallel fail on its lock.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from emadapt.errors import EmadaptError
from emadapt.pipeline.stages import PLAN, Needs, stale_ingests, stale_stages
from emadapt.pipeline.watchdog import Watchdog
from emadapt.study.loading import load_study
from emadapt.study.study import Study
from emadapt.training.devices import visible

LOGS = "scratch/repro"
TAIL = 15
"""Lines of a failed stage's log that are printed."""

Submit = Callable[[str, list[str]], Future[tuple[bool, str]]]
"""Starts a stage on devices. The result: whether it succeeded, and the line to print."""


def run_pipeline(jobs: int, gpus: list[str]) -> int:
    """Run all stages that are out of date, `jobs` at a time, which share the CPU's cores.

    The stages get `gpus` as `place` says; without any they choose for themselves.

    Returns:
        0, or 1 if a stage failed. Stages that do not need the failed one are finished first.

    Raises:
        EmadaptError: another `emadapt repro` is at work here, or the pipeline cannot be read.
    """
    slots = [gpus[i % len(gpus)] if gpus else "" for i in range(max(jobs, len(gpus)))]
    with _alone(), Watchdog() as watchdog, _stoppable(watchdog), ThreadPoolExecutor(jobs) as pool:

        def submit(stage: str, devices: list[str]) -> Future[tuple[bool, str]]:
            share = len(os.sched_getaffinity(0)) * len(devices) // len(slots)
            return pool.submit(run_stage, stage, devices, max(1, share) * (jobs > 1), watchdog)

        if code := _schedule(stale_ingests(), slots, jobs, {}, submit):
            return code
        study = load_study()
        if code := _schedule({PLAN: set()}, slots, jobs, {}, submit):
            return code
        needs = stale_stages(study)
        if not needs:
            print("repro: every stage is up to date")
            return 0
        shared = len(gpus) < jobs
        return _schedule(needs, slots, jobs, {} if shared else useful_devices(study), submit)


def useful_devices(study: Study) -> dict[str, int]:
    """How many devices each `train` stage can use: one for each sample of a batch, or one."""
    found = {}
    for unit in study.units():
        regime = study.regime_settings[unit.regime]
        batch = study.train_settings(unit).batch
        datasets = len(study.train_set_settings[unit.train_set].datasets)
        found[f"train@{unit.name}"] = max(batch, datasets) if regime.several_devices else 1
    return found


def place(
    ready: Sequence[str], free: Sequence[str], room: int, useful: Mapping[str, int]
) -> dict[str, list[str]]:
    """Which stages start now, on which devices: one each, the rest to those that can use more.

    Args:
        ready: stages that wait for a device only, first come first served.
        free: devices, each as often as stages may have it at once; no stage gets a GPU twice.
        room: how many stages may start.
        useful: how many devices a stage can use, if more than one.
    """
    placed = {stage: [device] for stage, device in zip(ready[:room], free, strict=False)}
    for device in free[len(placed) :]:
        takers = [
            stage
            for stage, own in placed.items()
            if len(own) < useful.get(stage, 1) and (device == "cpu" or device not in own)
        ]
        if takers:
            placed[min(takers, key=lambda stage: len(placed[stage]))].append(device)
    return placed


def run_stage(stage: str, devices: list[str], threads: int, watchdog: Watchdog) -> tuple[bool, str]:
    """Run one stage in a process group, output to a log: whether it succeeded, a line to print."""
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if any(devices):
        environment |= {"EMADAPT_DEVICES": ",".join(devices), **visible(devices)}
    started, log = time.monotonic(), Path(LOGS) / f"{stage.replace('/', '_')}.log"
    command = ["dvc", "--wait-for-lock", "repro", "--single-item", stage]
    with log.open("w") as out:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with watchdog.over(child.pid):
            code = child.wait()
    text, seconds = log.read_text(), f"{time.monotonic() - started:.0f} s"
    if code:
        last = "\n".join(f"    {line}" for line in text.strip().splitlines()[-TAIL:])
        return False, f"{stage}: failed after {seconds}; {log} ends with\n{last}"
    return True, f"{stage}: {seconds if 'Running stage' in text else 'up to date'}"


def _schedule(
    needs: Needs, slots: list[str], jobs: int, useful: dict[str, int], submit: Submit
) -> int:
    """Run stages as soon as what they need is done and a device is free; 1 if any failed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    done, failed = set[str](), set[str]()
    running: dict[Future[tuple[bool, str]], str] = {}
    free, has = list(slots), dict[str, list[str]]()
    now = TextColumn("{task.fields[now]}")
    columns = (TextColumn("repro"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), now)
    with Progress(*columns, disable=not needs) as bar:
        task = bar.add_task("", total=len(needs), now="")
        while True:
            begun = done | failed | set(running.values())
            ready = [stage for stage in needs if stage not in begun and needs[stage] <= done]
            placed = place(ready, free, jobs - len(running), useful)
            has |= placed
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
    if failed:
        skipped = ", ".join(sorted(set(needs) - done - failed)) or "none"
        failures = ", ".join(sorted(failed))
        print(f"repro: failed: {failures}; skipped, since these failed: {skipped}", file=sys.stderr)
    return 1 if failed else 0


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


@contextmanager
def _stoppable(watchdog: Watchdog) -> Iterator[None]:
    """When this process is told to stop, it ends its stages first."""

    def stop(number: int, frame: object) -> None:
        watchdog.stop()
        print("repro: stopped; run it again to go on", file=sys.stderr)
        os._exit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
