"""Runs in a real MLflow on sqlite: whatever happens, work goes on and nothing is lost or twice."""

import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from click.testing import CliRunner

from emadapt.cli import main
from emadapt.errors import InputError
from emadapt.tracking import publish as publishing
from emadapt.tracking import send, store, views
from emadapt.tracking.provenance import provenance_tags
from emadapt.tracking.publish import live, publish, sync
from emadapt.tracking.relocate import moved, relocate, tracking_uri
from emadapt.tracking.run import FOLDER, Dataset, Run, settings_digest
from emadapt.training.train import train_unit
from runs import runs_of
from tiny import make_study

DEAD = "http://127.0.0.1:9"
TAGS = {"unit": "dinov2_s-lora-lucchi-0", "regime": "lora", "seed": 0}
PARAMS = {"train": {"lr": 1e-4, "amp": True}, "rank": 16}


@pytest.fixture(autouse=True)
def no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins with a store that has not failed."""
    monkeypatch.setattr(publishing, "_failed_at", {})


stored = partial(runs_of, study="demo")
"""MLflow's runs."""


def curve(root: Path, name: str, run: Any = None) -> list[tuple[int, float]]:
    """Every stored point of a metric, doubles included."""
    run_id = (run or stored(root)[0]).info.run_id
    return sorted((m.step, m.value) for m in store.client(root).get_metric_history(run_id, name))


def waiting(root: Path) -> list[Path]:
    """Files of runs that MLflow does not have yet."""
    return sorted((root / FOLDER).glob("*.json"))


def a_run(root: Path, **changes: Any) -> Run:
    return Run("demo", TAGS["unit"], dict(TAGS), PARAMS, root=root, **changes)  # type: ignore[arg-type]


def a_training(root: Path, epochs: int = 3) -> None:
    """What train does, in small."""
    run = a_run(root)
    digest = "0123456789abcdef0123456789abcdef"
    run.datasets = [Dataset("lucchi", digest, "data/lucchi", "training")]
    with live(run) as log:
        for epoch in range(1, epochs + 1):
            log({"train/loss": 1 / epoch, "val/iou": epoch / 10}, epoch)
        (root / "model.bin").write_bytes(b"weights")
        run.artifacts["model/model.bin"] = root / "model.bin"
        run.tags["model.md5"] = "m1"


def check_training(root: Path, epochs: int = 3) -> Any:
    (run,) = stored(root)
    assert (run.info.run_name, run.info.status) == (TAGS["unit"], "FINISHED")
    assert run.data.params == {"train.lr": "0.0001", "train.amp": "true", "rank": "16"}
    assert (run.data.tags["model.md5"], run.data.tags["origin"]) == ("m1", "trained")
    assert run.data.tags["settings"] == settings_digest(PARAMS), "the same after an outage"
    steps = range(1, epochs + 1)
    assert curve(root, "train/loss") == [(epoch, 1 / epoch) for epoch in steps]
    assert curve(root, "val/iou") == [(epoch, epoch / 10) for epoch in steps]
    (read,) = run.inputs.dataset_inputs
    assert read.dataset.name == "lucchi"
    assert [(tag.key, tag.value) for tag in read.tags] == [("mlflow.data.context", "training")]
    artifacts = Path(unquote(run.info.artifact_uri.removeprefix("file://")))
    assert artifacts.is_relative_to(root / "mlruns")
    assert (artifacts / "model/model.bin").read_bytes() == b"weights"
    assert run.info.end_time >= run.info.start_time
    assert not waiting(root)
    return run


def everything(root: Path) -> str:
    """All that the database has."""
    with sqlite3.connect(root / "mlflow.db") as database:
        return "\n".join(database.iterdump())


# -- publishing


def test_a_live_run_is_in_mlflow_epoch_by_epoch(root: Path) -> None:
    run = a_run(root)
    with live(run) as log:
        log({"val/iou": 0.5}, 1)
        assert curve(root, "val/iou") == [(1, 0.5)]
        assert stored(root)[0].info.status == "RUNNING"
        assert sync(root) == (0, 0), "it is alive: not ours to end"
    assert stored(root)[0].info.status == "FINISHED"
    a_training(root)
    assert len(stored(root)) == 2, "a training from the start is a new run"
    later, earlier = stored(root)
    assert later.data.tags["replaced"] == "no"
    assert earlier.data.tags["replaced"] == later.info.run_id


def test_the_run_of_the_model_that_is_there_is_the_one_that_is_not_replaced(root: Path) -> None:
    def published(md5: str, **tags: str) -> str:
        run = a_run(root, same=("unit", "model.md5"))
        run.tags |= {"model.md5": md5, **tags}
        return publish(run)

    first, second, again = published("1"), published("2"), published("1")
    other = published("3", **{"dvc.experiment": "bold-idea"})
    assert again == first
    replaced = {run.info.run_id: run.data.tags["replaced"] for run in stored(root)}
    assert replaced == {first: "no", second: first, other: "no"}


def test_mlflow_measures_the_machine_while_a_watched_run_is_live(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    for watched in (False, True):
        with live(a_run(root, watched=watched)):
            time.sleep(0.5)
    later, earlier = stored(root)
    assert "system/cpu_utilization_percentage" in later.data.metrics
    assert not earlier.data.metrics


def test_publishing_again_changes_nothing(root: Path) -> None:
    a_training(root)
    before = everything(root)
    run = a_run(root, same=("unit", "model.md5"), origin="restored")
    run.tags |= {"model.md5": "m1", "git.commit": "later"}
    for epoch in (1, 2, 3):
        run.log({"train/loss": 1 / epoch, "val/iou": epoch / 10}, epoch)
    run.artifacts["model/model.bin"] = root / "model.bin"
    publish(run)
    once = everything(root)
    assert len(once) - len(before) < 1000, "a tag more, and nothing else"
    for again in (run, a_run(root, same=run.same, metrics=run.metrics)):
        again.tags, again.artifacts = dict(run.tags), dict(run.artifacts)
        publish(again)
        assert everything(root) == once
    assert check_training(root).data.tags["git.commit"] == "later"


def test_not_a_number(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with live(a_run(root)) as log:
        log({"train/loss": float("nan"), "val/iou": 0.5, "lr": float("inf")}, 3)
    (run,) = stored(root)
    assert run.data.metrics == {"val/iou": 0.5}
    assert run.data.tags["nonfinite"] == "train/loss=nan, lr=inf at step 3"
    assert "train/loss=nan" in caplog.text


def test_what_mlflow_refuses_does_not_hold_up_the_rest(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = a_run(root, results={"../bad name": "x"}, metrics={0: {"a": 1.0}})
    run.artifacts["not there.bin"] = root / "not there.bin"
    publish(run)
    (only,) = stored(root)
    assert (only.data.metrics, only.info.status) == ({"a": 1}, "FINISHED")
    assert "MLflow refuses tags" in caplog.text
    assert "not there.bin is gone" in caplog.text
    assert not waiting(root)


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("out of memory"), "FAILED"), (KeyboardInterrupt(), "KILLED")],
)
def test_how_a_run_ended(root: Path, error: BaseException, status: str) -> None:
    run = a_run(root)
    run.tags |= {"backbone": "dinov2_s", "train_set": "lucchi"}
    with pytest.raises(type(error)), live(run):
        raise error
    (only,) = stored(root)
    assert only.info.status == status
    if status == "FAILED":
        assert only.data.tags["error"] == "RuntimeError: out of memory"
        line = "dinov2_s, lora, trained on lucchi, seed 0. Stopped by RuntimeError: out of memory"
        assert only.data.tags["mlflow.note.content"] == line
    with live(a_run(root, same=("unit",))):
        pass
    (only,) = stored(root)
    assert (only.info.status, "error" in only.data.tags) == ("FINISHED", False)


# -- outages


def test_left_for_later_nothing_is_sent_until_sync(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMADAPT_TRACKING", "later")
    a_training(root)
    assert store.client(root).get_experiment_by_name("demo") is None
    assert len(waiting(root)) == 1
    assert sync(root) == (1, 0)  # whatever the setting says
    check_training(root)


def test_an_outage_is_said_once_and_made_up_for_by_sync(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    started = time.monotonic()
    a_training(root)
    assert time.monotonic() - started < 15
    assert caplog.text.count("the server does not answer. Work goes on") == 1
    assert "emadapt track sync" in caplog.text
    assert sync(root) == (0, 1)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (file,) = waiting(root)
    again = file.read_bytes()
    assert sync(root) == (1, 0)
    check_training(root)
    file.write_bytes(again)  # as if it had died before it could remove the file
    assert sync(root) == (1, 0)
    check_training(root)
    assert sync(root) == (0, 0)


def test_a_server_that_never_answers_costs_one_wait(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        started = time.monotonic()
        with live(a_run(root)) as log:
            opened = time.monotonic()
            for epoch in range(100):
                log({"train/loss": 1.0}, epoch)
        assert opened - started < 15
        assert time.monotonic() - opened < 3
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert sync(root) == (1, 0)
    assert len(curve(root, "train/loss")) == 100


def test_a_locked_database(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.client(root)
    lock = sqlite3.connect(root / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(send, "PATIENCE", 1.0)
        with live(a_run(root)) as log:
            log({"a": 1.0}, 1)
    assert time.monotonic() - started < 5
    lock.execute("ROLLBACK")
    lock.close()
    sync(root)  # meanwhile the write that was given up may go through as well
    assert {run.info.status for run in stored(root)} <= {"FINISHED", "RUNNING"}
    assert [(1, 1)] in [curve(root, "a", run) for run in stored(root)]


def test_a_database_that_is_removed_loses_nothing(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with live(a_run(root)) as log:
        log({"a": 1.0}, 1)
        (root / "mlflow.db").unlink()
        log({"a": 2.0}, 2)
    assert "mlflow.db: attempt to write a readonly database. Work goes on" in caplog.text
    (file,) = waiting(root)
    assert json.loads(file.read_text())["metrics"] == {"1": {"a": 1.0}, "2": {"a": 2.0}}


def test_a_disk_that_takes_nothing(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    store.client(root)
    shutil.rmtree(root / "scratch")
    (root / "scratch").write_text("a file where the folder should be")
    with live(a_run(root)) as log:
        log({"a": 1.0}, 1)
    assert "cannot be kept" in caplog.text
    assert curve(root, "a") == [(1, 1)], "what can be sent is sent"


# -- processes that die


def killed(root: Path, uri: str) -> None:
    if uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri
    run = a_run(root)
    run.tags["unit.key"] = "k"
    with live(run) as log:
        for epoch in (1, 2, 3):
            log({"a": epoch}, epoch)
        os._exit(9)


def kill_a_training(root: Path, uri: str = "") -> None:
    process = multiprocessing.get_context("fork").Process(target=killed, args=(root, uri))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert len(waiting(root)) == 1


@pytest.mark.parametrize("uri", ["", DEAD], ids=["", "outage"])
def test_killed_and_resumed_is_one_run(root: Path, uri: str) -> None:
    kill_a_training(root, uri)
    run = a_run(root, same=("unit", "unit.key"))
    run.tags["unit.key"] = "k"
    with live(run) as log:
        assert stored(root)[0].info.status == "RUNNING"
        log({"a": 3}, 3)  # the checkpoint was of epoch 2
        log({"a": 4}, 4)
    (only,) = stored(root)
    assert only.info.status == "FINISHED"
    assert curve(root, "a") == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert not waiting(root)


def test_killed_and_not_resumed_ends_as_killed(root: Path) -> None:
    kill_a_training(root)
    (root / FOLDER / "u-01234567.json").write_text('{"study": "demo", "na')  # not a run
    assert sync(root) == (1, 0)
    (only,) = stored(root)
    assert (only.info.status, only.data.metrics) == ("KILLED", {"a": 3})
    assert sync(root) == (0, 0)


def first_use(root: Path, number: int) -> None:
    run = Run("demo", f"unit-{number}", {"unit": f"unit-{number}"}, root=root)
    run.log({"a": number})
    os._exit(0 if publish(run) else 1)


def test_first_use_by_four_processes(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=first_use, args=(tmp_path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(run.data.metrics["a"] for run in stored(tmp_path)) == [0, 1, 2, 3]


def test_units_that_were_not_trained_here_get_a_run_that_says_so(
    tmp_path: Path, tracking_off: None, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `dvc pull`; with their history, and twice is as good as once."""
    study = make_study(tmp_path)
    train_unit(study, study.units()[0])
    shutil.copy(empty_store, tmp_path)
    monkeypatch.delenv("EMADAPT_TRACKING")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    result = CliRunner().invoke(main, ["track", "sync"])
    assert result.exit_code == 1
    assert "0 runs published, 1 left; 0 units are in MLflow\n" in result.output
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for published in (1, 0):
        result = CliRunner().invoke(main, ["track", "sync"])
        assert f"{published} runs published, 0 left; 1 units are in MLflow\n" in result.output
        assert result.exit_code == 0
        (only,) = stored(tmp_path, study="tiny")
        assert (only.data.tags["origin"], only.info.status) == ("restored", "FINISHED")
        assert [step for step, _ in curve(tmp_path, "val/iou", only)] == [1, 2]
        assert "val/best_iou" in only.data.metrics


# -- where the store is


@pytest.mark.parametrize("name", ["moved", "project/inside"])
def test_a_moved_checkout(root: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    a_training(root)
    there = root.parent / name
    shutil.copytree(root, root.parent / "copy")
    shutil.rmtree(root)
    there.parent.mkdir(exist_ok=True)
    shutil.move(root.parent / "copy", there)
    assert moved(there) == str(root)
    a_training(there)
    assert f"emadapt track relocate {root}" in caplog.text
    assert not (root / "mlruns").exists()
    assert relocate(there, str(root)) == 2, "the experiment and its run"
    assert relocate(there, str(root)) == 0
    assert moved(there) is None
    assert sync(there) == (1, 0)
    assert len(stored(there)) == 2
    for run in stored(there):
        model = Path(run.info.artifact_uri) / "model/model.bin"
        assert model.is_relative_to(there)
        assert model.is_file()


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, uri in (
        ("", f"sqlite:///{tmp_path}/mlflow.db"),
        ("sqlite:///sub/other.db", f"sqlite:///{tmp_path}/sub/other.db"),
        ("http://server:5000", "http://server:5000"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        assert tracking_uri(tmp_path) == uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/db")
    with pytest.raises(InputError) as error:
        relocate(tmp_path, "/old")
    assert "secret" not in str(error.value)


def test_a_checkout_with_an_odd_name(tmp_path: Path, empty_store: Path) -> None:
    root = tmp_path / "what?a%2Fb #c"
    root.mkdir()
    shutil.copy(empty_store, root)
    a_training(root)
    check_training(root)
    assert moved(root) is None
    assert list(tmp_path.rglob("mlflow.db")) == [root / "mlflow.db"]


def test_passwords_stay_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "PATIENCE", 1.0)
    dead = "postgresql://me:secret@127.0.0.1:9/db?password=secret"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead)
    run = a_run(tmp_path, results={"storage": "mysql://me:secret@host/db", "plain": "me@host"})
    run.params = {"storage": "postgresql://me:secret@host/db"}
    run.datasets = [Dataset("a", "b", "https://me:secret@host/file", "test")]
    publish(run)
    assert "postgresql://***@127.0.0.1:9" in caplog.text
    assert "secret" not in caplog.text
    (file,) = waiting(tmp_path)
    assert "secret" not in file.read_text()
    assert "me@host" in file.read_text()


def test_off_and_light(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from emadapt.tracking.publish import live\n"
        "from emadapt.tracking.run import Run\n"
        "with live(Run('demo', 'a', {'unit': 'a'}, {'x': 1})) as log:\n"
        "    log({'a': 1.0}, 1)\n"
        "assert 'mlflow' not in sys.modules\n"
    )
    environment = {**os.environ, "EMADAPT_TRACKING": "off"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


def test_provenance(tmp_path: Path) -> None:
    """The commit, whether code differs from it, and hashes of settings and data."""
    md5 = "0123456789abcdef0123456789abcdef.dir"
    files = {"params.yaml": "a: 1\n", "data.dvc": f"outs:\n- md5: {md5}\n  path: data\n"}
    for name, text in {**files, "dvc.lock": "1", "code.py": "1"}.items():
        (tmp_path / name).write_text(text)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in ("init -q", "add .", "commit -q -m x"):
        subprocess.run([*git, *words.split()], check=True)
    tags = provenance_tags(tmp_path)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    sha256 = hashlib.sha256(b"a: 1\n").hexdigest()
    known = {"git.commit": head.stdout.strip(), "git.dirty": "false", "data.md5": md5}
    assert tags == known | {"params.sha256": sha256}
    (tmp_path / "dvc.lock").write_text("2")  # every stage rewrites it
    (tmp_path / "params.yaml").write_text("a: 2\n")  # another study: it has a tag of its own
    other = provenance_tags(tmp_path)
    assert other.pop("params.sha256") != sha256
    assert other == known
    (tmp_path / "code.py").write_text("2")
    assert provenance_tags(tmp_path)["git.dirty"] == "true"


# -- what a person sees


def a_unit(root: Path, regime: str, seed: int, scores: dict[str, float], **changes: Any) -> str:
    """What train and evaluate publish, in small; scores by dataset. Gives the run's id."""
    name = f"dinov2_s-{regime}-paired-{seed}"
    tags = {"unit": name, "backbone": "dinov2_s", "regime": regime, "train_set": "paired"}
    tags |= {"seed": str(seed), "stage": "train", "git.commit": "c0ffee", "git.dirty": "false"}
    tags["model.md5"] = f"{regime}-{seed}"
    params = {"unit": {"regime": regime, "seed": seed}}
    run = Run("demo", name, tags, params, root=root, same=("unit", "model.md5"), **changes)
    run.log({"val/best_iou": 0.7} | {f"test/iou.{name}": score for name, score in scores.items()})
    return publish(run)


def test_what_a_person_sees_in_mlflow(root: Path) -> None:
    client = store.client(root)
    frozen = a_unit(root, "frozen", 0, {"lucchi": 0.78, "vnc": 0.82})
    note = client.get_experiment_by_name("demo").tags["mlflow.note.content"]
    assert "over-seeds" not in note, "one seed: no means"
    loras = [a_unit(root, "lora", seed, {"lucchi": 0.8, "vnc": 0.6}) for seed in (0, 1)]
    experiment = client.get_experiment_by_name("demo")
    for key, name in {"test-iou": "Test IoU", "over-seeds": "Means over seeds"}.items():
        assert f"[{name}](#/experiments/1/runs?" in experiment.tags["mlflow.note.content"]
        view = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
        shown = set(json.loads(view["state"])["selectedColumns"])
        assert {"metrics.`test/iou.lucchi`", "metrics.`test/iou.vnc`"} <= shown
    one, other, apart = (client.get_run(own).data.tags for own in (*loras, frozen))
    assert one["settings"] == other["settings"] != apart["settings"]
    assert "Test IoU 0.800 on lucchi, 0.600 on vnc." in other["mlflow.note.content"]


def test_what_a_person_wrote_in_mlflow_stays(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_id, client = a_unit(root, "lora", 0, {"lucchi": 0.8}), store.client(root)
    client.set_tag(run_id, "mlflow.note.content", "Looked at by hand.")
    client.set_experiment_tag("1", "mlflow.note.content", "Ours.")
    assert a_unit(root, "lora", 0, {"lucchi": 0.9, "vnc": 0.5}) == run_id
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == "Looked at by hand."
    tags = client.get_experiment("1").tags
    assert tags["mlflow.note.content"] == "Ours."
    assert "test/iou.vnc" in tags["mlflow.sharedViewState.test-iou"], "nobody touched it"
    monkeypatch.setattr(views, "refresh_run", lambda *_: 1 / 0)
    a_unit(root, "frozen", 0, {"lucchi": 0.8})
    assert "description" in caplog.text
    assert {run.info.status for run in stored(root)} == {"FINISHED"}
