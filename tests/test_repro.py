"""Which stage runs when and on what; DVC is a script that notes down what it was called with."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from emadapt.errors import ConfigError, EmadaptError
from emadapt.pipeline import repro
from emadapt.pipeline.repro import run_pipeline
from emadapt.pipeline.stages import stale_ingests, tokens_first
from emadapt.study.loading import load_study
from processes import until
from tiny import make_study, settings, under_dvc

DVC = """#!/bin/sh
began=$(date +%s%N)
sleep 0.2
facts='{"devices": "%s", "cuda": "%s", "threads": "%s", "began": %s, "ended": %s}'
printf "$facts" "$EMADAPT_DEVICES" \\
    "${CUDA_VISIBLE_DEVICES-unset}" "$OMP_NUM_THREADS" "$began" "$(date +%s%N)" > "seen-$4.json"
"""


def fake_dvc(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    dvc = folder / "bin/dvc"
    dvc.parent.mkdir()
    dvc.write_text(script)
    dvc.chmod(0o755)
    monkeypatch.setattr(repro, "BIN", dvc.parent)


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four units that wait for one stage, the last of them also for the others; a report."""
    monkeypatch.chdir(tmp_path)
    make_study(tmp_path, settings(batch=4), ingested=False)
    pairs = [(regime, data) for regime in ("frozen", "lora") for data in ("a", "paired")]
    units = [f"train@t-{regime}-{data}-0" for regime, data in pairs]
    needs = {"tokens": set(), **{u: {"tokens"} for u in units[:3]}}
    needs |= {units[3]: set(units[:3]), "report": {units[3]}}
    monkeypatch.setattr(repro, "stale_ingests", dict)
    monkeypatch.setattr(repro, "stale_stages", lambda _: needs)
    monkeypatch.setattr("emadapt.pipeline.repro.os.sched_getaffinity", lambda _: set(range(8)))
    for name in ("EMADAPT_DEVICES", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    fake_dvc(tmp_path, monkeypatch, DVC)


def run(jobs: int, gpus: list[str]) -> dict[str, dict[str, str]]:
    """Environment that each stage saw, and from when to when it ran."""
    assert run_pipeline(jobs, gpus) == 0
    seen = {f.stem.removeprefix("seen-"): json.loads(f.read_text()) for f in Path().glob("seen-*")}
    del seen["plan"]
    return seen


@pytest.mark.parametrize(("jobs", "gpus"), [(3, ["0", "1", "2"]), (4, ["0", "1"])])
def test_stages_that_run_together_share_the_devices(
    graph: None, jobs: int, gpus: list[str]
) -> None:
    seen = run(jobs, gpus)
    assert (seen["tokens"]["devices"], seen["tokens"]["cuda"]) == ("0", "0")
    together = [s for name, s in seen.items() if name.startswith("train@t-frozen")]
    assert len({s["devices"] for s in together}) == 2
    assert {s["devices"] for s in seen.values()} <= set(gpus)
    assert {s["threads"] for s in seen.values()} == {str(8 // jobs)}


def test_without_devices_as_many_stages_run_at_once_as_asked_for(graph: None) -> None:
    seen = run(2, [])
    facts = {(s["devices"], s["cuda"], s["threads"]) for s in seen.values()}
    assert facts == {("", "unset", "4")}
    spans = sorted((int(s["began"]), int(s["ended"])) for s in seen.values())
    assert all(sum(a <= moment < b for a, b in spans) <= 2 for moment, _ in spans)


def test_stages_share_no_more_cores_than_the_user_allows(
    graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert {s["threads"] for s in run(2, []).values()} == {"2"}


def test_one_stage_at_a_time_has_the_whole_machine(graph: None) -> None:
    seen = run(1, [])
    assert {s["threads"] for s in seen.values()} == {""}
    assert len(seen) == 6


def test_units_wait_for_the_token_caches_that_they_read(tmp_path: Path) -> None:
    needs = tokens_first(make_study(tmp_path, ingested=False))
    assert needs["train@t-lora-a-0"] == {"tokens@t-a"}
    assert needs["evaluate@t-lora-a-0"] == {"tokens@t-a", "tokens@t-b"}
    assert load_study(tmp_path / "params.yaml").units()


ENDLESS = """#!/bin/sh
sleep 987654 &
sleep 987654
"""
DEAF = ENDLESS.replace("sleep 987654 &\n", "sleep 987654 &\ntrap '' TERM\n")


@pytest.mark.parametrize(
    ("number", "script", "late"),
    [(n, ENDLESS, 0) for n in (signal.SIGKILL, signal.SIGHUP, signal.SIGTERM, signal.SIGINT)]
    + [(n, DEAF, 0) for n in (signal.SIGKILL, signal.SIGTERM)]
    + [(n, ENDLESS, 2) for n in (signal.SIGKILL, signal.SIGTERM)],
)
def test_no_stage_survives_repro(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    script: str,
    late: int,
) -> None:
    """Neither a child of a stage, nor one that does not listen, nor one that is `late` to begin."""
    slow = f"watchdog.BEGIN = 'sleep {late}; ' + watchdog.BEGIN"
    with endless(tmp_path, monkeypatch, script, slow) as process:
        process.send_signal(number)
        time.sleep(0.3)
        process.send_signal(number)  # of one who is impatient
        process.wait(30)
    until(lambda: not stages_of(tmp_path))


def test_under_nohup_stages_outlive_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with endless(tmp_path, monkeypatch, ENDLESS, ignored) as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        process.terminate()
        process.wait(30)
    until(lambda: not stages_of(tmp_path))


@contextmanager
def endless(
    folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, first: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A `repro` of two stages that run `script`, once they run; `first` is run before."""
    monkeypatch.chdir(folder)
    fake_dvc(folder, monkeypatch, script)
    code = (
        "import signal; from pathlib import Path\n"
        "from emadapt.pipeline import repro, watchdog\n"
        "for number in (signal.SIGINT, signal.SIGHUP):\n"
        "    signal.signal(number, signal.SIG_DFL)\n"  # pytest may be in the background
        f"repro.BIN = Path({str(folder)!r}) / 'bin'\n"
        "repro.load_study = lambda: None\n"
        "repro.stale_ingests = lambda: {'one': set(), 'two': set()}\n"
        f"{first}\n"
        "repro.run_pipeline(2, [])"
    )
    monkeypatch.setenv("MARKER", str(folder))
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        until(lambda: len(stages_of(folder)) >= 4)
        yield process


def stages_of(marker: Path) -> list[int]:
    """Processes of stages: those with the marker in their environment, but for Python's."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"MARKER={marker}\0".encode() in environment and b"python" not in command:
            found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_the_pipeline_on_two_devices(
    tmp_path: Path, tracking_off: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real dvc.yaml around a tiny study of one unit, which is told to use both."""
    monkeypatch.setenv("EMADAPT_DEVICES", "cpu,cpu")
    params = settings()
    params["study"] |= {"regimes": ["frozen"], "train_sets": ["paired"]}
    make_study(tmp_path, params, ingested=False)
    under_dvc(tmp_path)("emadapt", "repro")
    model = json.loads(Path("build/units/t-frozen-paired-0/model.json").read_text())
    assert model["processes"] == 2
    assert Path("reports/summary.json").is_file()


def test_settings_are_checked_before_anything_else(tmp_path: Path, tracking_off: None) -> None:
    """DVC would say that it could not find `study.datasets`."""
    Path("params.yaml").write_text("study: {dataset: [a]}")
    with pytest.raises(ConfigError, match=r"datasets"):
        run_pipeline(1, [])
    assert not Path("scratch").exists()


@pytest.mark.parametrize("name", ["dvc.lock", ".dvc/tmp/rwlock"])
def test_what_a_full_disk_leaves_of_dvcs_files(
    tmp_path: Path, tracking_off: None, name: str
) -> None:
    from dvc.repo import Repo

    make_study(tmp_path, ingested=False)
    shutil.copy(Path(__file__).parents[1] / "dvc.yaml", tmp_path)
    Repo.init(no_scm=True).close()
    Path(name).touch()
    with pytest.raises(EmadaptError, match=f"dvc: .*{name}.*delete that file and repeat"):
        stale_ingests()
    Path(name).unlink()
    assert stale_ingests().keys() == {"ingest@a", "ingest@b"}


def test_two_at_once_in_one_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused while the first lives; not by what a killed one left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(repro, "stale_ingests", dict)
    monkeypatch.setattr(repro, "stale_stages", lambda _: {})
    monkeypatch.setattr(repro, "run_stage", lambda *_: (True, ""))
    monkeypatch.setattr(repro, "load_study", lambda: None)
    hold = (
        "import time; from emadapt.pipeline import repro\n"
        "repro.load_study = lambda: None\n"
        "repro.stale_ingests = lambda: (print('held', flush=True), time.sleep(60))\n"
        "repro.run_pipeline(1, [])"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(EmadaptError, match="another `emadapt repro`"):
            run_pipeline(1, [])
        first.kill()
    assert Path("scratch/repro/lock").is_file()
    assert run_pipeline(1, []) == 0
