"""A training that is tracked, and what the store has of it."""

import json
from pathlib import Path

from emadapt.tracking import store as mlflow_store
from emadapt.tracking import tracker as tracking

DEAD = "http://127.0.0.1:9"
TAGS = {"unit": "dinov2_s-lora-lucchi-0", "regime": "lora", "seed": 0}


def runs(root, study="demo"):
    store = mlflow_store.client(root)
    return store.search_runs([store.get_experiment_by_name(study).experiment_id])


def curves(root, run_id, *names):
    """{name: [(step, value)]} with every stored point, doubles included."""
    store = mlflow_store.client(root)
    return {
        name: sorted((m.step, m.value) for m in store.get_metric_history(run_id, name))
        for name in names
    }


def spools(root):
    return sorted((root / tracking.SPOOL).glob("*/entries.jsonl"))


def a_training(root, epochs=3, **kwargs):
    """What train does, in small."""
    with tracking.open_run(
        root, "demo", TAGS, {"train": {"lr": 1e-4, "amp": True}, "rank": 16}, **kwargs
    ) as run:
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
