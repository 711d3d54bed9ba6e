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
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue

from emadapt.errors import EmadaptError

LOGS = "scratch/repro"


def run_pipeline(jobs: int, gpus: list[str]) -> int:
    """Run all stages that are out of date, `jobs` at a time.

    Args:
        jobs: stages that run at once; the CPU's cores are shared out among them.
        gpus: device numbers handed to the stages in turn; empty: leave the choice to them.

    Returns:
        0, or 1 if a stage failed. Stages that do not need the failed one are finished first.
    """
    needs = stage_graph()
    slots: Queue[str] = Queue()
    for i in range(jobs):
        slots.put(gpus[i % len(gpus)] if gpus else "")
    os.makedirs(LOGS, exist_ok=True)
    with _children() as children, ThreadPoolExecutor(jobs) as pool:
        return _schedule(needs, lambda stage: pool.submit(_run_stage, stage, slots, jobs, children))


def stage_graph() -> dict[str, set[str]]:
    """Every stage of dvc.yaml with the stages it needs.

    Raises:
        EmadaptError: DVC cannot read the pipeline, or data/ is not what data.dvc records: DVC would silently take edited
            data as its new version.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            if os.path.exists("data.dvc") and repo.status(targets=["data.dvc"]):
                keep, undo = "dvc add data", "dvc checkout --force data.dvc"
                raise EmadaptError(f"data: not what data.dvc records; keep the change with `{keep}`, or undo it with `{undo}`")
            graph = repo.index.graph
            stages = {s: s.addressing for s in graph.nodes if getattr(s, "cmd", None)}
            return {name: {stages[n] for n in graph.successors(s) if n in stages} for s, name in stages.items()}
    except DvcException as error:
        raise EmadaptError(f"dvc.yaml: {error}") from error


def _schedule(needs: dict[str, set[str]], submit) -> int:  # type: ignore[no-untyped-def]
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    done: set[str] = set()
    failed: set[str] = set()
    running: dict[Future[tuple[bool, str]], str] = {}
    columns = (TextColumn("repro"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[now]}"))
    with Progress(*columns) as bar:
        task = bar.add_task("", total=len(needs), now="")
        while True:
            waiting = [s for s in needs if s not in done | failed and s not in running.values()]
            running |= {submit(s): s for s in waiting if needs[s] <= done}
            if not running:
                break
            bar.update(task, now=", ".join(sorted(running.values())[:2]))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stage = running.pop(future)
                ok, words = future.result()
                (done if ok else failed).add(stage)
                bar.console.print(words, markup=False, highlight=False)
                bar.update(task, completed=len(done))
    skipped = sorted(set(needs) - done - failed)
    if failed:
        unrun = ", ".join(skipped) or "none"
        print(f"repro: failed: {', '.join(sorted(failed))}; not run for want of them: {unrun}", file=sys.stderr)
    return 1 if failed else 0


def _run_stage(stage: str, slots: Queue[str], jobs: int, children: set[subprocess.Popen[str]]) -> tuple[bool, str]:
    """One stage in a process group of its own, its output kept in a log; the closing line says how it went."""
    device = slots.get()
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))  # a batch job's share of a node
    if device:
        environment["CUDA_VISIBLE_DEVICES"] = device
    started, log = time.monotonic(), os.path.join(LOGS, f"{stage.replace('/', '_')}.log")
    try:
        with open(log, "w") as out:
            command = ["dvc", "--wait-for-lock", "repro", "--single-item", stage]
            child = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=out,
                                     stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
            children.add(child)
            code = child.wait()
            children.discard(child)
    finally:
        slots.put(device)
    text = Path(log).read_text()
    if code:
        return False, f"{stage}: failed after {time.monotonic() - started:.0f} s; {log} ends with\n{_tail(text)}"
    return True, f"{stage}: {'up to date' if 'Running stage' not in text else f'{time.monotonic() - started:.0f} s'}"


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
