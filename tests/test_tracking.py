"""The lab book against a real MLflow in sqlite: whatever happens to the store, work goes on and nothing is lost or doubled."""

import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emadapt import mlflow_page, mlflow_store, tracking
from emadapt.errors import InputError

DEAD = "http://127.0.0.1:9"
TAGS = {"unit": "dinov2_s-lora-lucchi-0", "regime": "lora", "seed": 0}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """One database for all tests, copied into each root: creating one takes seconds."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    root = tmp_path_factory.mktemp("empty")
    mlflow_store.client(root)
    return root / "mlflow.db"


@pytest.fixture
def root(tmp_path, empty_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("EMADAPT_TRACKING", raising=False)
    root = tmp_path / "project"
    root.mkdir()
    shutil.copy(empty_store, root / "mlflow.db")
    return root


def runs(root, study="demo"):
    store = mlflow_store.client(root)
    return store.search_runs([store.get_experiment_by_name(study).experiment_id])


def curves(root, run_id, *names):
    """{name: [(step, value)]} with every stored point, doubles included."""
    store = mlflow_store.client(root)
    return {name: sorted((m.step, m.value) for m in store.get_metric_history(run_id, name)) for name in names}


def spools(root):
    return sorted((root / tracking.SPOOL).glob("*/entries.jsonl"))


def a_training(root, epochs=3, **kwargs):
    """What train does, in small."""
    with tracking.open_run(root, "demo", TAGS, {"train": {"lr": 1e-4, "amp": True}, "rank": 16}, **kwargs) as run:
        for epoch in range(epochs):
            run.log_metrics({"train/loss": 1 / (epoch + 1), "val/iou": epoch / 10}, epoch)
        run.log_dict({"lr": 1e-4}, "config.json")
        run.log_dataset("lucchi", "0123456789abcdef0123456789abcdef.dir", "data/lucchi", "train")
        run.set_tags({"model.md5": "m1"})
        (root / "model.bin").write_bytes(b"weights")
        run.log_artifact(root / "model.bin", "model")
        (root / "model.bin").write_bytes(b"overwritten later")


def check_training(root, epochs=3, status="FINISHED"):
    (run,) = runs(root)
    assert (run.info.run_name, run.info.status) == (TAGS["unit"], status)
    assert run.data.params == {"train.lr": "0.0001", "train.amp": "true", "rank": "16"}
    assert run.data.tags["model.md5"] == "m1"
    assert run.data.tags["origin"] == "trained"
    assert curves(root, run.info.run_id, "train/loss", "val/iou") == {
        "train/loss": [(epoch, 1 / (epoch + 1)) for epoch in range(epochs)],
        "val/iou": [(epoch, epoch / 10) for epoch in range(epochs)],
    }
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "lucchi"
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "train")]
    artifacts = Path(run.info.artifact_uri)
    assert artifacts.is_relative_to(root / "mlruns")
    assert (artifacts / "model/model.bin").read_bytes() == b"weights"
    assert json.loads((artifacts / "config.json").read_text()) == {"lr": 1e-4}
    assert run.info.end_time >= run.info.start_time


def test_a_run_and_its_experiment(root):
    a_training(root)
    check_training(root)
    assert spools(root) == []
    (run,) = runs(root)
    assert tracking.find_run(root, "demo", {"unit": str(TAGS["unit"]), "model.md5": "m1"}) == run.info.run_id
    assert tracking.find_run(root, "demo", {"unit": "another"}) is None
    assert tracking.find_run(root, "no such study", {"unit": "another"}) is None


def test_left_for_later_nothing_is_sent_until_sync_and_then_it_equals_undisturbed(root, monkeypatch):
    monkeypatch.setenv("EMADAPT_TRACKING", "later")
    a_training(root)
    assert mlflow_store.client(root).get_experiment_by_name("demo") is None
    assert len(spools(root)) == 1
    assert tracking.sync(root)[1] == 0  # whatever the setting says
    check_training(root)
    assert spools(root) == []


def test_dead_server_then_sync_equals_undisturbed(root, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    start = time.monotonic()
    a_training(root)
    assert time.monotonic() - start < 15
    said = [record.message for record in caplog.records]
    assert sum("does not answer" in text for text in said) == 1
    assert "emadapt track sync" in said[-1]
    (spool,) = spools(root)
    assert tracking.sync(root) == (0, 10)  # open, params, 3 epochs, dict, dataset, tags, artifact, end
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    again = root / "kept"
    shutil.copytree(spool.parent, again)
    assert tracking.sync(root) == (10, 0)
    check_training(root)
    assert spools(root) == []
    assert tracking.sync(root) == (0, 0)
    shutil.copytree(again, spool.parent)  # as if the process had died before it could remove the spool
    assert tracking.sync(root) == (10, 0)
    check_training(root)


def test_server_that_never_answers(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        run = tracking.open_run(root, "demo", TAGS, {})
        opened = time.monotonic()
        for epoch in range(100):
            run.log_metrics({"train/loss": 1.0}, epoch)
        run.end()
        assert opened - start < 15
        assert time.monotonic() - opened < 1
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.sync(root) == (102, 0)
    assert len(curves(root, runs(root)[0].info.run_id, "train/loss")["train/loss"]) == 100


def test_a_store_that_comes_back_gets_all_in_the_same_run(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    run = tracking.open_run(root, "demo", TAGS, {})
    run.log_metrics({"a": 1}, 0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    run.log_metrics({"a": 2}, 1)
    assert run.run_id is None  # not tried: the last failure is too young
    run._failed_at -= 100
    run.log_metrics({"a": 3}, 2)
    assert curves(root, run.run_id, "a") == {"a": [(0, 1), (1, 2), (2, 3)]}
    assert tracking.sync(root) == (0, 0)  # it is alive: not ours to send
    run.end()
    assert spools(root) == []


def test_locked_database(root, monkeypatch):
    monkeypatch.setattr(mlflow_store, "PATIENCE", 1.0)
    run = tracking.open_run(root, "demo", TAGS, {})
    lock = sqlite3.connect(root / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    start = time.monotonic()
    run.log_metrics({"a": 1}, 0)
    run.log_metrics({"a": 2}, 1)
    run.end()
    assert time.monotonic() - start < 5
    lock.execute("ROLLBACK")
    lock.close()
    tracking.sync(root)  # meanwhile the write that was given up may go through as well
    (stored,) = runs(root)
    assert stored.info.status == "FINISHED"
    assert curves(root, stored.info.run_id, "a") == {"a": [(0, 1), (1, 2)]}


def test_full_disk(root, monkeypatch, caplog):
    write, full = os.write, True

    def half_written(fd, data):
        return write(fd, data[: len(data) // 2]) if full else write(fd, data)

    run = tracking.open_run(root, "demo", TAGS, {})
    monkeypatch.setattr(os, "write", half_written)
    run.log_metrics({"a": 1}, 0)
    assert "the disk is full" in caplog.text
    assert curves(root, run.run_id, "a") == {"a": [(0, 1)]}  # what can be sent is sent
    full = False
    run.log_metrics({"a": 2}, 1)
    lines = [json.loads(line) for line in spools(root)[0].read_text().splitlines()]
    assert [line["values"]["a"] for line in lines if line.get("do") == "metrics"] == [1, 2]
    run.end()
    assert len(runs(root)) == 1
    shutil.rmtree(root / "scratch")
    (root / "scratch").write_text("a file where the folder should be")
    with tracking.open_run(root, "demo", TAGS, {}) as run:
        run.log_metrics({"a": 1})
        run.log_dict({}, "config.json")
    assert "cannot be written" in caplog.text


def test_not_a_number(root, caplog):
    with tracking.open_run(root, "demo", TAGS, {}) as run:
        run.log_metrics({"train/loss": float("nan"), "val/iou": 0.5, "lr": float("inf")}, 3)
    (stored,) = runs(root)
    assert stored.data.metrics == {"val/iou": 0.5}
    assert stored.data.tags["nonfinite"] == "train/loss=nan, lr=inf at step 3"
    assert "train/loss=nan" in caplog.text


def test_a_refused_entry_does_not_hold_up_the_rest(root, caplog):
    with tracking.open_run(root, "demo", TAGS, {}) as run:
        run.set_tags({"../bad name": "x"})
        run.log_artifact(root / "not there.bin")
        run.log_metrics({"a": 1})
    (stored,) = runs(root)
    assert (stored.data.metrics, stored.info.status) == ({"a": 1}, "FINISHED")
    assert "refused" in caplog.text
    assert "not there.bin" in caplog.text
    assert spools(root) == []


def test_failure_is_recorded(root):
    tags = {**TAGS, "backbone": "dinov2_s", "train_set": "lucchi"}
    with pytest.raises(RuntimeError), tracking.open_run(root, "demo", tags, {}):
        raise RuntimeError("out of memory")
    (stored,) = runs(root)
    assert (stored.info.status, stored.data.tags["error"]) == ("FAILED", "RuntimeError: out of memory")
    line = "dinov2_s, lora, trained on lucchi, seed 0. Stopped by RuntimeError: out of memory"
    assert stored.data.tags["mlflow.note.content"] == line
    with tracking.open_run(root, "demo", tags, {}, resume_by=["unit"]):
        pass
    assert "Stopped" not in runs(root)[0].data.tags["mlflow.note.content"]


def test_a_run_that_is_gone_is_logged_again(root):
    with tracking.open_run(root, "demo", TAGS, {"rank": 4}) as run:
        run.run_id = "0" * 32
        run.log_metrics({"a": 1})
    (stored,) = runs(root)
    assert (stored.data.metrics, stored.data.params) == ({"a": 1}, {"rank": "4"})


def test_evaluate_goes_on_with_the_run_of_train(root):
    a_training(root)
    (trained,) = runs(root)
    tags = {**TAGS, "model.md5": "m1", "git.commit": "later", "origin": "ignored"}
    for value in (0.8, 0.8, 0.9):
        resume = ("unit", "model.md5")
        with tracking.open_run(root, "demo", tags, {"rank": 99, "new": 1}, resume_by=resume, origin="restored") as run:
            assert run.run_id == trained.info.run_id
            run.log_metrics({"test/iou.lucchi": value})
    (stored,) = runs(root)
    assert stored.data.params == {**trained.data.params, "new": "1"}
    assert stored.data.tags["origin"] == "trained"
    assert stored.info.status == "FINISHED"
    assert stored.data.metrics["test/iou.lucchi"] == 0.9
    assert curves(root, stored.info.run_id, "test/iou.lucchi")["test/iou.lucchi"] == [(0, 0.8), (0, 0.9)]
    assert stored.info.end_time - stored.info.start_time < 60_000


def test_evaluate_of_a_restored_model_makes_one_run(root):
    a_training(root)
    tags = {**TAGS, "model.md5": "from the cache"}
    for _ in range(2):
        with tracking.open_run(root, "demo", tags, {}, resume_by=("unit", "model.md5"), origin="restored") as run:
            run.log_metrics({"test/iou.lucchi": 0.8})
    restored = [run for run in runs(root) if run.data.tags["origin"] == "restored"]
    assert len(runs(root)) == 2
    assert [run.data.metrics for run in restored] == [{"test/iou.lucchi": 0.8}]


def killed_training(root, uri):
    if uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri
    run = tracking.open_run(root, "demo", {**TAGS, "train.key": "k"}, {})
    for epoch in range(3):
        run.log_metrics({"a": epoch}, epoch)
    os._exit(9)


@pytest.mark.parametrize("uri", [None, DEAD])
def test_killed_and_resumed_is_one_run(root, uri, monkeypatch):
    process = multiprocessing.get_context("fork").Process(target=killed_training, args=(root, uri))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert len(spools(root)) == 1
    # The checkpoint is of epoch 1, so epoch 2 is trained, and logged, a second time.
    run = tracking.open_run(root, "demo", {**TAGS, "train.key": "k"}, {}, resume_by=("unit", "train.key"))
    (stored,) = runs(root)
    assert (run.run_id, stored.info.status) == (stored.info.run_id, "RUNNING")
    run.log_metrics({"a": 2}, 2)
    run.log_metrics({"a": 3}, 3)
    run.end()
    (stored,) = runs(root)
    assert stored.info.status == "FINISHED"
    assert curves(root, stored.info.run_id, "a") == {"a": [(0, 0), (1, 1), (2, 2), (3, 3)]}
    assert spools(root) == []


def test_killed_and_not_resumed_ends_as_killed(root):
    process = multiprocessing.get_context("fork").Process(target=killed_training, args=(root, None))
    process.start()
    process.join(60)
    with spools(root)[0].open("a") as file:
        file.write('{"do": "metrics", "at')  # the machine went down in the middle of a line
    assert tracking.sync(root) == (1, 0)
    (stored,) = runs(root)
    assert (stored.info.status, stored.data.metrics) == ("KILLED", {"a": 2})
    assert tracking.sync(root) == (0, 0)


def a_unit(root, regime, seed, scores, params=(), status="FINISHED", **kwargs):
    """What train and evaluate do with the lab book, in small; scores by dataset."""
    tags = {"unit": f"dinov2_s-{regime}-paired-{seed}", "backbone": "dinov2_s", "regime": regime, "train_set": "paired"}
    tags |= {"seed": seed, "stage": "train", "git.commit": "c0ffee", "git.dirty": False, "model.md5": f"{regime}-{seed}"}
    settings = {"unit": {"regime": regime, "seed": seed}, "train": {"epochs": 3, **dict(params)}}
    resume_by = ("unit", "model.md5")
    with tracking.open_run(root, "demo", tags, settings, **kwargs) as run:
        run.log_metrics({"val/best_iou": 0.7})
        run.set_tags({"n.train": 48})
        run.end(status)
    with tracking.open_run(root, "demo", {**tags, "n.test.lucchi": 32}, settings, resume_by=resume_by) as run:
        run.log_metrics({f"test/iou.{name}": score for name, score in scores.items()})
        run.end(status)
    return run.run_id


def test_what_a_person_sees_in_mlflow(root):
    ids = {}
    ids["frozen 0"] = a_unit(root, "frozen", 0, {"lucchi": 0.78, "vnc": 0.82})
    store = mlflow_store.client(root)
    note = store.get_experiment_by_name("demo").tags["mlflow.note.content"]
    assert "tested on lucchi, vnc." in note
    assert "over-seeds" not in note  # one seed: no means
    ids["lora 0"] = a_unit(root, "lora", 0, {"lucchi": 0.83, "vnc": 0.6}, origin="restored")
    ids["lora 1"] = a_unit(root, "lora", 1, {"lucchi": 0.81, "vnc": 0.5})
    ids["failed"] = a_unit(root, "lora", 2, {}, params={"epochs": 4}, status="FAILED")

    experiment = store.get_experiment_by_name("demo")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    note = experiment.tags["mlflow.note.content"]
    found = {}
    for text in re.findall(r"^- `` (.*) ``: ", note, re.MULTILINE):
        found[text] = {name for name, i in ids.items() if i in {r.info.run_id for r in store.search_runs(["1"], text)}}
    assert found == {
        'tags.regime = "lora"': {"lora 0", "lora 1", "failed"},
        'tags.backbone = "dinov2_s" and tags.train_set = "paired"': set(ids),
        'tags.unit LIKE "%-frozen-%"': {"frozen 0"},
        "metrics.`test/iou.lucchi` > 0.8": {"lora 0", "lora 1"},
        "metrics.`test/iou.vnc` > 0.8": {"frozen 0"},
        'tags.seed = "0"': {"frozen 0", "lora 0"},
        'attributes.status != "FINISHED"': {"failed"},
        'tags.origin = "restored"': {"lora 0"},
        'tags.`git.dirty` = "false"': set(ids),
    }
    for key, name in {"test-iou": "Test IoU", "over-seeds": "Means over seeds"}.items():
        assert f"[{name}](#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey={key})" in note
        view = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
        assert view["name"] == name
        assert {"metrics.`test/iou.lucchi`", "metrics.`test/iou.vnc`"} <= set(json.loads(view["state"])["selectedColumns"])

    tags = {name: store.get_run(i).data.tags for name, i in ids.items()}
    assert tags["lora 0"]["settings"] == tags["lora 1"]["settings"]
    assert len({run["settings"] for run in tags.values()}) == 3
    assert tags["lora 1"]["mlflow.note.content"] == (
        "dinov2_s, lora, trained on 48 slices of paired, seed 1. Validation IoU 0.700. "
        "Test IoU 0.810 on lucchi (32 slices), 0.500 on vnc."
    )
    assert tags["lora 1"]["mlflow.source.name"] == "emadapt train"
    assert tags["lora 1"]["mlflow.source.git.commit"] == "c0ffee"


def test_what_a_person_wrote_in_mlflow_stays(root, monkeypatch, caplog):
    run_id = a_unit(root, "lora", 0, {"lucchi": 0.8})
    store = mlflow_store.client(root)
    view = "mlflow.sharedViewState.test-iou"
    store.set_tag(run_id, "mlflow.note.content", "Looked at by hand.")
    store.set_experiment_tag("1", "mlflow.note.content", "Ours.")
    a_unit(root, "lora", 1, {"lucchi": 0.8, "vnc": 0.5})
    tags = {"unit": "dinov2_s-lora-paired-0", "model.md5": "lora-0"}
    with tracking.open_run(root, "demo", tags, {}, resume_by=("unit", "model.md5")) as run:
        run.log_metrics({"test/iou.lucchi": 0.9, "test/iou.vnc": 0.5})
    assert run.run_id == run_id
    assert store.get_run(run_id).data.tags["mlflow.note.content"] == "Looked at by hand."
    experiment = store.get_experiment("1")
    assert experiment.tags["mlflow.note.content"] == "Ours."
    assert "test/iou.vnc" in experiment.tags[view]  # not touched by anybody: brought up to date

    monkeypatch.setattr(mlflow_page, "refresh_run", lambda *_: 1 / 0)
    a_unit(root, "frozen", 0, {"lucchi": 0.8})
    assert "description" in caplog.text
    assert {run.info.status for run in runs(root)} == {"FINISHED"}
    assert spools(root) == []


def test_parent(root, monkeypatch):
    with tracking.open_run(root, "demo", {"unit": "sweep"}, {}) as parent:
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)  # a child that is logged later has its parent as well
    tracking.open_run(root, "demo", TAGS, {}, parent=parent.run_id).end()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.sync(root)[1] == 0
    (child,) = mlflow_store.client(root).search_runs(["1"], f"tags.mlflow.parentRunId = '{parent.run_id}'")
    assert child.info.run_name == TAGS["unit"]


@pytest.mark.browser
def test_the_views_in_a_browser(root, monkeypatch):
    for seed in (0, 1):
        a_unit(root, "lora", seed, {"lucchi": 0.8 + seed / 10, "vnc": 0.5})
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "docs")
    screenshots = importlib.import_module("screenshots")
    with screenshots.server(root / "mlflow.db") as port:
        page = f"http://{screenshots.HOST}:{port}/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey="
        table = screenshots.chromium(page + "test-iou", "--window-size=1480,640", "--dump-dom")
        means = screenshots.chromium(page + "over-seeds", "--window-size=1480,640", "--dump-dom")
    for text in ("dinov2_s-lora-paired-0", "test/iou.lucchi", "test/iou.vnc", "0.9"):
        assert text in table
    assert "Group: train_set: paired, regime: lora" in means
    assert "0.85" in means


def first_use(root, number):
    with tracking.open_run(root, "demo", {"unit": f"unit-{number}"}, {"n": number}) as run:
        run.log_metrics({"a": number})
    os._exit(0 if run.run_id else 1)


def test_first_use_by_four_processes(tmp_path, empty_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=first_use, args=(tmp_path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(run.data.metrics["a"] for run in runs(tmp_path)) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["moved", "project/inside"])
def test_moved_checkout(root, name, caplog):
    a_training(root)
    there = root.parent / name
    shutil.copytree(root, root.parent / "copy")
    shutil.rmtree(root)
    there.parent.mkdir(exist_ok=True)
    shutil.move(root.parent / "copy", there)
    assert tracking.moved(there) == str(root)
    a_training(there)
    assert f"emadapt track relocate {root}" in caplog.text
    assert not (root / "mlruns").exists()
    assert tracking.relocate(there, str(root)) == 2  # the experiment and its run
    assert tracking.relocate(there, str(root)) == 0
    assert tracking.moved(there) is None
    assert tracking.sync(there)[1] == 0
    stored = runs(there)
    assert len(stored) == 2
    for run in stored:
        assert (Path(run.info.artifact_uri) / "model/model.bin").is_relative_to(there)
        assert (Path(run.info.artifact_uri) / "model/model.bin").is_file()


def test_relocate_rewrites_whole_names_only(root):
    database = sqlite3.connect(root / "mlflow.db")
    with database:
        for place in ("/old/dir/mlruns/1", "file:///old/dir/mlruns/2", "/old/dir2/mlruns/3"):
            columns = "(name, artifact_location, lifecycle_stage)"
            database.execute(f"INSERT INTO experiments {columns} VALUES (?, ?, 'active')", (place, place))
    assert tracking.relocate(root, "/old/dir/") == 2
    places = {place for (place,) in database.execute("SELECT artifact_location FROM experiments")}
    assert {f"{root}/mlruns/1", f"file://{root}/mlruns/2", "/old/dir2/mlruns/3"} <= places
    database.close()


def test_relocate_needs_a_local_database(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/db")
    with pytest.raises(InputError) as error:
        tracking.relocate(tmp_path, "/old")
    assert "secret" not in str(error.value)


def test_where_the_store_is(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub/other.db")
    assert tracking.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/sub/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking.tracking_uri(tmp_path) == "http://server:5000"


def test_passwords_stay_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mlflow_store, "PATIENCE", 1.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@127.0.0.1:9/db?password=secret")
    with tracking.open_run(tmp_path, "demo", TAGS, {"storage": "postgresql://me:secret@host/db"}) as run:
        run.log_dict({"storage": "postgresql://me:secret@host/db"}, "config.json")
        run.set_tags({"storage": "mysql://me:secret@host/db", "plain": "me@host"})
        run.log_dataset("a", "b", "https://me:secret@host/file", "train")
    assert "postgresql://***@127.0.0.1:9" in caplog.text
    assert "secret" not in caplog.text
    kept = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"secret" not in kept
    assert b"me@host" in kept


def test_off_and_light(tmp_path):
    code = (
        "import sys; from pathlib import Path; from emadapt import tracking\n"
        "with tracking.open_run(Path(sys.argv[1]), 'demo', {'unit': 'a'}, {'x': 1}) as run:\n"
        "    run.log_metrics({'a': float('nan')}, 1); run.log_artifact(Path('no file')); run.log_dict({}, 'a.json')\n"
        "    run.log_params({}); run.set_tags({'a': None}); run.log_dataset('a', 'b', 'c', 'd')\n"
        "assert 'mlflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "EMADAPT_TRACKING": "off"}, check=True)
    assert list(tmp_path.iterdir()) == []


def test_provenance(tmp_path):
    assert tracking.provenance_tags(tmp_path) == {}
    (tmp_path / "params.yaml").write_text("a: 1\n")
    (tmp_path / "data.dvc").write_text("outs:\n- md5: 0123456789abcdef0123456789abcdef.dir\n  path: data\n")
    (tmp_path / "dvc.lock").write_text("1")

    def git(*args):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    tags = tracking.provenance_tags(tmp_path)
    assert tags == {
        "git.commit": git("rev-parse", "HEAD"),
        "git.dirty": "false",
        "params.sha256": hashlib.sha256(b"a: 1\n").hexdigest(),
        "data.md5": "0123456789abcdef0123456789abcdef.dir",
    }
    (tmp_path / "dvc.lock").write_text("2")  # every stage rewrites it
    assert tracking.provenance_tags(tmp_path)["git.dirty"] == "false"
    (tmp_path / "params.yaml").write_text("a: 2\n")
    assert tracking.provenance_tags(tmp_path)["git.dirty"] == "true"
    assert tracking.provenance_tags(tmp_path)["params.sha256"] != tags["params.sha256"]
