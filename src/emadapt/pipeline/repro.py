"""Run the pipeline with independent stages at the same time. `dvc repro` runs one after the other.

Each stage is one `dvc --wait-for-lock repro --single-item STAGE`, started when the stages that it
needs are done. Other ways to run DVC in parallel fail on its lock.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from emadapt.errors import EmadaptError
from emadapt.pipeline.stages import PLAN, Needs, stale_ingests, stale_stages
from emadapt.pipeline.watchdog import Watchdog
from emadapt.progress import progress_bar
from emadapt.study.loading import load_study
from emadapt.training.devices import share_of_cores, visible

LOGS = "scratch/repro"
BIN = Path(sys.executable).parent
"""Where this environment has `dvc`, and the `emadapt` that stages call, activated or not."""
TAIL = 15
"""Lines of a failed stage's log that are printed."""

Submit = Callable[[str, str], Future[tuple[bool, str]]]
"""Starts a stage on a device. The result: whether it succeeded, and the line to print."""


def run_pipeline(jobs: int, gpus: list[str]) -> int:
    """Run all stages that are out of date, `jobs` at a time, which share the CPU's cores.

    Each stage gets one of `gpus`; without any they choose for themselves.

    Returns:
        0, or 1 if a stage failed. Stages that do not need the failed one are finished first.

    Raises:
        EmadaptError: another `emadapt repro` is at work here, or the pipeline cannot be read.
    """
    study = load_study()
    slots = [gpus[i % len(gpus)] if gpus else "" for i in range(jobs)]
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "PATH": path} | share_of_cores(jobs)
    with _alone(), Watchdog() as watchdog, _stoppable(watchdog), ThreadPoolExecutor(jobs) as pool:

        def submit(stage: str, device: str) -> Future[tuple[bool, str]]:
            own = visible([device]) | {"EMADAPT_DEVICES": device} if device else {}
            return pool.submit(run_stage, stage, environment | own, watchdog)

        if code := _schedule(stale_ingests(), slots, submit):
            return code
        if code := _schedule({PLAN: set()}, slots, submit):
            return code
        needs = stale_stages(study)
        if not needs:
            print("repro: every stage is up to date")
        return _schedule(needs, slots, submit)


def run_stage(stage: str, environment: Mapping[str, str], watchdog: Watchdog) -> tuple[bool, str]:
    """Run one stage in a process group, output to a log: whether it succeeded, a line to print."""
    started, log = time.monotonic(), Path(LOGS) / f"{stage.replace('/', '_')}.log"
    command = ["dvc", "--wait-for-lock", "repro", "--single-item", stage]
    with log.open("w") as out:
        code = watchdog.run(command, environment, out)
    text, seconds = log.read_text(), f"{time.monotonic() - started:.0f} s"
    if code:
        last = "\n".join(f"    {line}" for line in text.strip().splitlines()[-TAIL:])
        return False, f"{stage}: failed after {seconds}; {log} ends with\n{last}"
    return True, f"{stage}: {seconds if 'Running stage' in text else 'up to date'}"


def _schedule(needs: Needs, slots: list[str], submit: Submit) -> int:
    """Run stages as soon as what they need is done and a device is free; 1 if any failed."""
    done, failed = set[str](), set[str]()
    running: dict[Future[tuple[bool, str]], tuple[str, str]] = {}
    free = list(slots)
    with progress_bar("repro", len(needs), shown=bool(needs)) as advance:
        while True:
            begun = done | failed | {stage for stage, _ in running.values()}
            ready = [stage for stage in needs if stage not in begun and needs[stage] <= done]
            for stage in ready[: len(free)]:
                device = free.pop(0)
                running[submit(stage, device)] = stage, device
            if not running:
                break
            advance(0, ", ".join(sorted(stage for stage, _ in running.values())[:2]))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stage, device = running.pop(future)
                free.append(device)
                ok, words = future.result()
                (done if ok else failed).add(stage)
                print(words, flush=True)
                advance(int(ok))
    if failed:
        skipped = ", ".join(sorted(set(needs) - done - failed))
        also = f"; skipped, since these failed: {skipped}" if skipped else ""
        print(f"repro: failed: {', '.join(sorted(failed))}{also}", file=sys.stderr)
    return 1 if failed else 0


@contextmanager
def _alone() -> Iterator[None]:
    """Holds the checkout's lock, which the kernel takes back however this process ends."""
    os.makedirs(LOGS, exist_ok=True)
    try:
        lock = FileLock(f"{LOGS}/lock").acquire(blocking=False)
    except Timeout:
        raise EmadaptError(
            "another `emadapt repro` is at work in this checkout; wait for it, or use a clone"
        ) from None
    with lock:
        yield


@contextmanager
def _stoppable(watchdog: Watchdog) -> Iterator[None]:
    """When this process is told to stop, it ends its stages first. Ignored signals stay ignored."""

    def stop(number: int, frame: object) -> None:
        for other in numbers:  # a second signal would wait for this wait, for ever
            signal.signal(other, signal.SIG_IGN)
        watchdog.stop()
        print("repro: stopped; run it again to go on", file=sys.stderr)
        os._exit(128 + number)

    every = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    numbers = [number for number in every if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
