"""Models for other programs: a graph gives the model's probabilities at any size."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

from emadapt.cli import main
from emadapt.data.fetch import record_of
from emadapt.data.sources import DATASETS
from emadapt.errors import EmadaptError, InputError
from emadapt.segment import export as graph
from emadapt.segment.export import CHECKED, INPUT, OUTPUT, TRACED, open_session, probe, write_onnx
from emadapt.segment.model import open_model
from emadapt.study.regimes import regime_settings
from tiny import write_3d_model, write_model

LORA = regime_settings(kind="lora", rank=2, alpha=4)
U_NET: dict[str, Any] = {"regime": regime_settings(kind="unet2d"), "head": "unet2d"}
SIZE = (3, 11)
"""Rows and columns of patches that the command neither traces nor checks at."""
PARTS = [
    {"head": "linear", "arch": "tiny_dinov2_reg"},
    {"head": "pyramid_bn", "arch": "tiny_dinov3"},
    {"head": "deconv", "arch": "tiny_openclip", "regime": regime_settings(kind="bitfit")},
    {"head": "pyramid", "regime": regime_settings(kind="lora_last_k", rank=2, alpha=4, k=2)},
    U_NET,
]
"""Each family, head and kind of adapter once."""


def written(folder: Path, **settings: Any) -> tuple[Any, Any]:
    """A model and an onnxruntime session of its graph."""
    model = open_model(write_model(folder / "model", **settings))
    found = write_onnx(model, folder / "model.onnx")
    assert len(found) == len(CHECKED)
    assert 0 < max(found.values()) < 1e-3
    return model, open_session(folder / "model.onnx")


def compare(model: Any, session: Any) -> None:
    """Against what `emadapt segment` calls for a tile."""
    height, width = (n * model.segmenter.patch for n in SIZE)
    grey = probe(2, height, width, 5)
    given = session.run([OUTPUT], {INPUT: grey})[0]
    assert given.shape == (2, 1, height, width)
    expected = model.segmenter.foreground(torch.from_numpy(grey) / 255, (height, width))
    assert expected.std() > 0.01  # not a constant, which would agree with anything
    np.testing.assert_allclose(given[:, 0], expected, atol=1e-3)


def test_a_graph_gives_the_models_probabilities_and_says_how_to_use_it(tmp_path):
    assert SIZE not in [(rows, columns) for _, rows, columns in (TRACED, *CHECKED)]
    model, session = written(tmp_path, regime=LORA, head="pyramid", scale=0.5)
    compare(model, session)
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["sides"] == "multiples of 14 pixels"
    assert json.loads(facts["pixel_nm"]) == {"a": [10.0, 10.0]}  # 5 nm, brought to half the size
    assert facts["terms"] == "a: not known here."
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", PARTS, ids=lambda own: own["head"])
def test_every_part_of_a_model(tmp_path, settings):
    compare(*written(tmp_path, **settings))


def test_the_rotary_embedding_has_the_places_of_the_image(tmp_path):
    """By itself, since tokens of a small random model hardly depend on it."""

    class Rotary(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = RotaryEmbeddingDinoV3(32)

        def forward(self, image):
            return self.embedding.get_embed(list(image.shape[2:])) + 0 * image.sum()

    model, file = Rotary().eval(), tmp_path / "r.onnx"
    how: dict[str, Any] = {"dynamo": False, "opset_version": graph.OPSET}
    how |= {"input_names": [INPUT], "output_names": [OUTPUT]}
    how["dynamic_axes"] = {INPUT: {2: "h", 3: "w"}}
    with mock.patch(graph.ROTARY, graph.centred), pytest.warns():
        torch.onnx.export(model, (torch.rand(1, 1, 6, 5),), file, **how)
    image = torch.rand(1, 1, 9, 17)
    found = open_session(file).run([OUTPUT], {INPUT: image.numpy()})[0]
    np.testing.assert_allclose(found, model(image).numpy(), atol=2e-5)


def test_a_graph_that_differs_is_not_left_behind(tmp_path, monkeypatch):
    model = open_model(write_model(tmp_path / "model"))
    real = graph.resampled
    monkeypatch.setattr(graph, "resampled", lambda *given, **named: 0 * real(*given, **named))
    (tmp_path / "model.onnx").write_text("what was there before")
    with pytest.raises(EmadaptError, match="differs from the model by"):
        write_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_text() == "what was there before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.onnx"]


@pytest.mark.parametrize(
    ("write", "change", "said"),
    [
        (write_model, {"context": 1}, "context: 1"),
        (write_model, {"align": "histogram", "reference": "a"}, "whole volume"),
        (write_model, {"regime": regime_settings(kind="knn"), "head": "knn"}, "regime knn"),
        (write_3d_model, {}, "neighbouring slices together"),
    ],
)
def test_what_is_no_function_of_one_image_is_refused(tmp_path, write, change, said):
    with pytest.raises(InputError, match=said):
        graph.check_exportable(open_model(write(tmp_path / "model", **change)))


def trained_on(name: str) -> dict[str, Any]:
    """Of model.json: what a model of a public dataset says of it."""
    own = DATASETS[name]
    facts: dict[str, Any] = {"data_md5": "0" * 32, "sources": record_of(own), "pairing": "number"}
    facts |= {"voxel_nm": list(own.voxel_nm), "shape": [20, 90, 100]}
    return {key: {name: value} for key, value in facts.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "dois", "step", "terms"),
    [
        ({"regime": LORA, "facts": trained_on("vnc")}, ["10.6084/m9.figshare.856713"], 14, "vnc: "),
        (U_NET, ["10.1038/s41592-018-0261-2"], 16, "a: not known here."),
    ],
    ids=["lora", "own data"],
)
def test_a_package_passes_bioimageio_without_a_network(
    tmp_path, monkeypatch, how, dois, step, terms
):
    from bioimageio.core import test_model as tested
    from bioimageio.spec import load_model_description

    for asked in ("socket.connect", "getaddrinfo"):
        monkeypatch.setattr(f"socket.{asked}", lambda *_, **__: pytest.fail("asks the network"))
    folder, out = write_model(tmp_path / "model", **how), tmp_path / "model.zip"
    words = ["export", str(folder), str(out), "--author", "A. Person"]
    assert CliRunner().invoke(main, words, catch_exceptions=False).exit_code == 0
    assert tested(out).status == "passed"
    described = load_model_description(out)
    assert [author.name for author in described.authors] == ["A. Person"]
    assert [str(entry.doi) for entry in described.cite] == dois
    given: Any = described.inputs[0].axes[2]
    assert given.size.step == step
    shutil.unpack_archive(out, tmp_path / "unpacked")
    assert terms in (tmp_path / "unpacked/LICENSE.md").read_text()
    again = CliRunner().invoke(main, words)
    assert (again.exit_code, "--overwrite" in again.output) == (2, True)
