"""Published systems as baselines: what is missing or does not fit is said before anything runs."""

from pathlib import Path

import pytest
import torch
from torch import nn

from emadapt.errors import InputError
from emadapt.models import mitonet, published
from emadapt.pipeline.check import check_study
from emadapt.study.loading import load_study
from outside import write_sam2
from tiny import make_study, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sam2(tmp_path_factory.mktemp("sam2"))


def test_what_is_missing_is_said_before_anything_runs(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = settings()
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.json").write_text("{}")
    (tmp_path / "half/preprocessor_config.json").write_text("{}")
    weights = {
        "gone": "/gone/sam2",
        "half": str(tmp_path / "half"),
        "hub": "nobody/sam2",
        "mito": "gone.pt",
    }
    params["regimes"] |= {
        name: {"kind": "mitonet" if name == "mito" else "sam2", "weights": w}
        for name, w in weights.items()
    }
    params["study"]["regimes"] = ["frozen", *weights]
    make_study(tmp_path, params, ingested=False)
    monkeypatch.setitem(published.PACKAGES, "mitonet", ("torch", ""))
    found = check_study(tmp_path / "params.yaml")
    assert [
        "no such folder;" in found[0],
        "a folder without model.safetensors;" in found[1],
        "no answer" in found[2],
    ] == [True] * 3
    assert all("hf download facebook/sam2.1-hiera-tiny" in line for line in found[:3])
    assert "weights gone.pt of regime mitonet: found no such file" in found[3]
    assert "zenodo.org/record/6861565" in found[3]
    monkeypatch.setitem(
        published.PACKAGES, "mitonet", ("no_such_module", "--no-deps empanada-dl==0.1.7")
    )
    monkeypatch.setitem(published.PACKAGES, "sam2", ("no_such_module", "transformers>=5.23,<6"))
    found = check_study(tmp_path / "params.yaml")
    assert all("no package no_such_module" in line and "-m pip install" in line for line in found)
    assert ("transformers" in found[0], "--no-deps empanada-dl==0.1.7" in found[3]) == (True, True)


def test_a_program_or_another_network_is_not_taken_for_mitonet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(published.PACKAGES, "mitonet", ("torch", ""))
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "program.pth")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    for name, said in (
        ("program.pth", "cannot be read.*TorchScript"),
        ("other.pt", "tensors of another network"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            mitonet.check(tmp_path / name)
        assert "torch.jit.load" in caught.value.do


def test_seeds_and_backbones_make_one_model_of_what_is_not_trained(
    tmp_path: Path, folder: Path, tracking_off: None
) -> None:
    from emadapt.training.plan import unit_key

    params = settings()
    params["regimes"] = {"o_oracle": {"kind": "sam2", "weights": str(folder), "prompts": "box"}}
    params["backbones"]["u"] = params["backbones"]["t"] | {"arch": "tiny_dinov3", "tile": 48}
    params["study"] |= {
        "regimes": ["o_oracle"],
        "train_sets": ["a"],
        "seeds": [0, 1],
        "backbones": ["t", "u"],
    }
    study = make_study(tmp_path, params)
    keys = {unit_key(study, unit) for unit in load_study(tmp_path / "params.yaml").units()}
    assert len(study.units()) == 4
    assert len(keys) == 1
