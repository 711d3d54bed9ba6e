"""Published systems as baselines: what is missing or does not fit is said before anything runs."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from emadapt.errors import InputError
from emadapt.models import mitonet, published
from emadapt.pipeline.check import check_study
from tiny import make_study, settings


@pytest.mark.parametrize(
    ("kind", "weights", "said"),
    [
        ("sam2", "/gone/sam2", "no such folder; .*hf download facebook/sam2.1-hiera-tiny"),
        ("sam2", "half", "a folder without model.safetensors;"),
        ("sam2", "nobody/sam2", "no answer"),
        ("mitonet", "gone.pt", "found no such file.*zenodo.org/record/6861565"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(tmp_path, monkeypatch, kind, weights, said):
    monkeypatch.chdir(tmp_path)
    Path("half").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        Path("half", name).write_text("{}")
    params = settings()
    params["regimes"]["theirs"] = {"kind": kind, "weights": weights}
    params["study"]["regimes"] = ["theirs"]
    make_study(tmp_path, params, ingested=False)
    monkeypatch.setitem(published.PACKAGES, "mitonet", ("torch", ""))
    (found,) = check_study(tmp_path / "params.yaml")
    assert re.search(said, found)
    monkeypatch.setitem(published.PACKAGES, kind, ("no_such_module", "--no-deps x==0.1.7"))
    (found,) = check_study(tmp_path / "params.yaml")
    assert re.search("no package no_such_module.*-m pip install --no-deps x==0.1.7", found)


def test_a_program_or_another_network_is_not_taken_for_mitonet(tmp_path, monkeypatch):
    monkeypatch.setitem(published.PACKAGES, "mitonet", ("torch", ""))
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "program.pth")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"cannot be read.*TorchScript"):
        mitonet.check(tmp_path / "program.pth")
    with pytest.raises(InputError, match="tensors of another network"):
        mitonet.check(tmp_path / "other.pt")
