"""What a person sees in MLflow; several processes; a moved checkout; where the store is, and what stays out of it."""

import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from emadapt.errors import InputError
from emadapt.tracking import store as mlflow_store
from emadapt.tracking import tracker as tracking
from emadapt.tracking import views as mlflow_page
from lab_book import DEAD, TAGS, a_training, runs, spools


def a_unit(root, regime, seed, scores, params=(), status="FINISHED", **kwargs):
    """What train and evaluate do with the lab book, in small; scores by dataset."""
    tags = {
        "unit": f"dinov2_s-{regime}-paired-{seed}",
        "backbone": "dinov2_s",
        "regime": regime,
        "train_set": "paired",
    }
    tags |= {
        "seed": seed,
        "stage": "train",
        "git.commit": "c0ffee",
        "git.dirty": False,
        "model.md5": f"{regime}-{seed}",
    }
    settings = {"unit": {"regime": regime, "seed": seed}, "train": {"epochs": 3, **dict(params)}}
    resume_by = ("unit", "model.md5")
    with tracking.open_run(root, "demo", tags, settings, **kwargs) as run:
        run.log_metrics({"val/best_iou": 0.7})
        run.set_tags({"n.train": 48})
        run.end(status)
    with tracking.open_run(
        root, "demo", {**tags, "n.test.lucchi": 32}, settings, resume_by=resume_by
    ) as run:
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
        found[text] = {
            name
            for name, i in ids.items()
            if i in {r.info.run_id for r in store.search_runs(["1"], text)}
        }
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
        assert (
            f"[{name}](#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey={key})"
            in note
        )
        view = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
        assert view["name"] == name
        assert {"metrics.`test/iou.lucchi`", "metrics.`test/iou.vnc`"} <= set(
            json.loads(view["state"])["selectedColumns"]
        )

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
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", DEAD
    )  # a child that is logged later has its parent as well
    tracking.open_run(root, "demo", TAGS, {}, parent=parent.run_id).end()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.sync(root)[1] == 0
    (child,) = mlflow_store.client(root).search_runs(
        ["1"], f"tags.mlflow.parentRunId = '{parent.run_id}'"
    )
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
            database.execute(
                f"INSERT INTO experiments {columns} VALUES (?, ?, 'active')", (place, place)
            )
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
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", "postgresql://me:secret@127.0.0.1:9/db?password=secret"
    )
    with tracking.open_run(
        tmp_path, "demo", TAGS, {"storage": "postgresql://me:secret@host/db"}
    ) as run:
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
        "import sys; from pathlib import Path; from emadapt.tracking import tracker as tracking\n"
        "with tracking.open_run(Path(sys.argv[1]), 'demo', {'unit': 'a'}, {'x': 1}) as run:\n"
        "    run.log_metrics({'a': float('nan')}, 1); run.log_artifact(Path('no file')); run.log_dict({}, 'a.json')\n"
        "    run.log_params({}); run.set_tags({'a': None}); run.log_dataset('a', 'b', 'c', 'd')\n"
        "assert 'mlflow' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "EMADAPT_TRACKING": "off"},
        check=True,
    )
    assert list(tmp_path.iterdir()) == []


def test_provenance(tmp_path):
    assert tracking.provenance_tags(tmp_path) == {}
    (tmp_path / "params.yaml").write_text("a: 1\n")
    (tmp_path / "data.dvc").write_text(
        "outs:\n- md5: 0123456789abcdef0123456789abcdef.dir\n  path: data\n"
    )
    (tmp_path / "dvc.lock").write_text("1")
    (tmp_path / "code.py").write_text("1")

    def git(*args):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

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
    (tmp_path / "params.yaml").write_text("a: 2\n")  # another study: it has a tag of its own
    assert tracking.provenance_tags(tmp_path) == tags | {
        "params.sha256": hashlib.sha256(b"a: 2\n").hexdigest()
    }
    (tmp_path / "code.py").write_text("2")
    assert tracking.provenance_tags(tmp_path)["git.dirty"] == "true"
