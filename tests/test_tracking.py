"""The lab book against a real MLflow in sqlite: whatever happens to the store, work goes on and nothing is lost or doubled."""

import json
import multiprocessing
import os
import shutil
import socket
import sqlite3
import time

import pytest

from emadapt.tracking import store as mlflow_store
from emadapt.tracking import tracker as tracking
from lab_book import DEAD, TAGS, a_training, check_training, curves, runs, spools


def test_a_run_and_its_experiment(root):
    a_training(root)
    check_training(root)
    assert spools(root) == []
    (run,) = runs(root)
    assert (
        tracking.find_run(root, "demo", {"unit": str(TAGS["unit"]), "model.md5": "m1"})
        == run.info.run_id
    )
    assert tracking.find_run(root, "demo", {"unit": "another"}) is None
    assert tracking.find_run(root, "no such study", {"unit": "another"}) is None


def test_left_for_later_nothing_is_sent_until_sync_and_then_it_equals_undisturbed(
    root, monkeypatch
):
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
    assert tracking.sync(root) == (
        0,
        10,
    )  # open, params, 3 epochs, dict, dataset, tags, artifact, end
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    again = root / "kept"
    shutil.copytree(spool.parent, again)
    assert tracking.sync(root) == (10, 0)
    check_training(root)
    assert spools(root) == []
    assert tracking.sync(root) == (0, 0)
    shutil.copytree(
        again, spool.parent
    )  # as if the process had died before it could remove the spool
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
    assert (stored.info.status, stored.data.tags["error"]) == (
        "FAILED",
        "RuntimeError: out of memory",
    )
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
        with tracking.open_run(
            root, "demo", tags, {"rank": 99, "new": 1}, resume_by=resume, origin="restored"
        ) as run:
            assert run.run_id == trained.info.run_id
            run.log_metrics({"test/iou.lucchi": value})
    (stored,) = runs(root)
    assert stored.data.params == {**trained.data.params, "new": "1"}
    assert stored.data.tags["origin"] == "trained"
    assert stored.info.status == "FINISHED"
    assert stored.data.metrics["test/iou.lucchi"] == 0.9
    assert curves(root, stored.info.run_id, "test/iou.lucchi")["test/iou.lucchi"] == [
        (0, 0.8),
        (0, 0.9),
    ]
    assert stored.info.end_time - stored.info.start_time < 60_000


def test_evaluate_of_a_restored_model_makes_one_run(root):
    a_training(root)
    tags = {**TAGS, "model.md5": "from the cache"}
    for _ in range(2):
        with tracking.open_run(
            root, "demo", tags, {}, resume_by=("unit", "model.md5"), origin="restored"
        ) as run:
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
    run = tracking.open_run(
        root, "demo", {**TAGS, "train.key": "k"}, {}, resume_by=("unit", "train.key")
    )
    (stored,) = runs(root)
    assert (run.run_id, stored.info.status) == (stored.info.run_id, "RUNNING")
    run.log_metrics({"a": 2}, 2)
    run.log_metrics({"a": 3}, 3)
    run.end()
    (stored,) = runs(root)
    assert stored.info.status == "FINISHED"
    assert curves(root, stored.info.run_id, "a") == {"a": [(0, 0), (1, 1), (2, 2), (3, 3)]}
    assert spools(root) == []


def test_what_a_killed_one_left_does_not_end_a_run_again_that_another_has_ended(root, monkeypatch):
    """The kernel may hold the dead one's lock a moment longer, so that its spool is found only when the other is done."""
    process = multiprocessing.get_context("fork").Process(target=killed_training, args=(root, None))
    process.start()
    process.join(60)
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_left_over", lambda *_: None)
        run = tracking.open_run(
            root, "demo", {**TAGS, "train.key": "k"}, {}, resume_by=("unit", "train.key")
        )
        run.log_metrics({"a": 3}, 3)
        run.end()
    assert len(spools(root)) == 1
    assert tracking.sync(root)[1] == 0
    (stored,) = runs(root)
    assert (stored.info.status, stored.data.metrics) == ("FINISHED", {"a": 3})
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
