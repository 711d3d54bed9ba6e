"""DVC's experiments run in a copy of the checkout, which is removed; what they log is kept."""

from pathlib import Path

import pytest

from emadapt.files import checkout_of
from emadapt.tracking import store
from runs import runs_of
from tiny import make_study, settings, under_dvc


@pytest.mark.parametrize("inside", ["", "sub"])
def test_a_copy_that_dvc_made_belongs_to_its_checkout(tmp_path, inside):
    assert checkout_of(tmp_path) == tmp_path
    assert checkout_of(tmp_path / ".dvc/tmp/exps/tmp1" / inside) == tmp_path


@pytest.mark.slow
def test_runs_of_experiments_are_in_the_mlflow_of_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EMADAPT_TRACKING", raising=False)
    params = settings()
    params["study"] |= {"datasets": ["a"], "regimes": ["frozen"], "train_sets": ["a"]}
    make_study(tmp_path, params, ingested=False)
    sh, train = under_dvc(tmp_path), "train@t-frozen-a-0"
    sh("git", "add", "--all")
    sh("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a study")
    sh("dvc", "exp", "run", "--temp", "--name", "one", "-S", "train.epochs=1", train)
    sh("dvc", "exp", "run", "--queue", "--name", "three", "-S", "train.epochs=3", train)
    sh("dvc", "exp", "run", "--run-all")
    assert not list((tmp_path / ".dvc/tmp/exps").glob("tmp*")), "the copies are gone"
    client, runs = store.client(tmp_path), runs_of(tmp_path)
    epochs = {run.data.tags["dvc.experiment"]: run.data.params["train.epochs"] for run in runs}
    assert epochs == {"one": "1", "three": "3"}
    for run in runs:
        assert run.info.status == "FINISHED"
        model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
        assert (Path(model.artifact_location) / "model.safetensors").is_file()
        assert Path(model.artifact_location).is_relative_to(tmp_path / "mlruns")
    assert len(list((tmp_path / "scratch/tokens").glob("[!.]*"))) > 0, "tokens are shared"
    assert not sh("git", "status", "--porcelain")
