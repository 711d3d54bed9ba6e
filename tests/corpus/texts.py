"""Hostile settings, archives, weights and model folders."""

import copy
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from files import Write, link, made, noise, pickle_that_touches, written
from safetensors.torch import save

import tiny

# -- settings


def text(content: str | bytes) -> Write:
    return written("params.yaml", content if isinstance(content, bytes) else content.encode())


def setting(where: str, value: Any) -> Write:
    """The tiny study with one value changed; `where` is a path with dots."""
    params = copy.deepcopy(tiny.settings())
    *above, last = where.split(".")
    place: Any = params
    for key in above:
        place = place.setdefault(key, {}) if isinstance(place.setdefault(key, {}), dict) else {}
    place[last] = value
    return text(yaml.safe_dump(params))


GOOD = yaml.safe_dump(tiny.settings())
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9)
)
STUDIES: dict[str, Write] = {
    "yaml-anchors-that-multiply": text(LAUGHS + GOOD.replace("study:", "study: *a9\nother:")),
    "yaml-anchor-of-itself": text(GOOD + "sweep: &a {x: *a}\n"),
    "yaml-tag-that-runs": text("study: !!python/object/apply:os.system ['touch ../ran']\n" + GOOD),
    "yaml-duplicate-keys": text(GOOD + "study: {name: other}\n"),
    "yaml-whole-number-of-5000-digits": text(GOOD.replace("epochs: 2", "epochs: " + "9" * 5000)),
    "yaml-1e400": text(GOOD.replace("batch: 2", "clip: 1e400\n  batch: 2")),
    "yaml-not-a-number": text(GOOD.replace("batch: 2", "clip: .nan\n  batch: 2")),
    "yaml-rank-of-a-billion": setting("regimes.lora.rank", 10**9),
    "yaml-nested-100000-deep": text("study: " + "[" * 100_000),
    "yaml-megabytes": text(GOOD + "".join(f"k{i}: {i}\n" for i in range(200_000))),
    "yaml-null-bytes": text(GOOD.encode() + b"\0\0"),
    "yaml-not-utf-8": text(b"\xff\xfe\x00study"),
    "yaml-empty": text(""),
    "yaml-a-list": text("- study\n"),
    "yaml-several-documents": text(GOOD + "---\n" + GOOD),
    "yaml-keys-that-are-lists": text("? [a, b]\n: 1\n" + GOOD),
    "yaml-name-that-climbs": setting("study.name", "../../etc"),
    "yaml-dataset-that-climbs": setting(
        "datasets.../../etc", {"layout": "stack", "voxel_nm": [1, 1, 1]}
    ),
    "yaml-unit-that-climbs": setting("study.train_sets", ["../a"]),
    "yaml-preset-that-is-a-list": setting("train", ["paper"]),
    "yaml-is-a-folder": made("params.yaml", Path.mkdir),
    "yaml-link-to-endless-zeros": link("/dev/zero", "params.yaml"),
    "yaml-is-a-pipe": made("params.yaml", os.mkfifo),
}


def study_called(name: str) -> Write:
    def write(folder: Path) -> str:
        (folder / "studies").mkdir()
        (folder.parent / "secret.yaml").write_text(GOOD)
        return name

    return write


USED: dict[str, Write] = {
    "use-a-study-that-climbs": study_called("../../secret"),
    "use-a-study-by-its-whole-path": study_called("/etc/passwd"),
    "use-a-study-with-a-null": study_called("a\0b"),
}


# -- weights


def safetensors(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str = "F32", shape: Any = (4, 4), offsets: Any = (0, 64)) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def raw_pickle(name: str) -> Write:
    return lambda folder: written(name, pickle_that_touches(folder.parent / "ran"))(folder)


def zipped_pickle(name: str) -> Write:
    """As torch.save writes it, with another pickle inside."""

    def write(folder: Path) -> Path:
        with zipfile.ZipFile(folder / name, "w") as z:
            z.writestr("a/data.pkl", pickle_that_touches(folder.parent / "ran"))
            z.writestr("a/version", "3\n")
            z.writestr("a/byteorder", "little")
        return folder / name

    return write


def torch_bomb(folder: Path) -> Path:
    """A state dict whose only tensor is deflated, 1.3 GB of zeros."""
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(16)}, buffer)
    with (
        zipfile.ZipFile(buffer) as have,
        zipfile.ZipFile(folder / "w.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z,
    ):
        for info in have.infolist():
            if not info.filename.endswith("data/0"):
                z.writestr(info.filename, have.read(info))
                continue
            with z.open(info.filename, "w", force_zip64=True) as out:
                for _ in range(80):
                    out.write(bytes(1 << 24))
    return folder / "w.pt"


def huge_tensor(folder: Path) -> Path:
    """A tensor that claims 4 TB of a storage of 64 bytes."""
    torch.save({"w": torch.zeros(16).as_strided((1 << 20, 1 << 20), (0, 0))}, folder / "w.pt")
    return folder / "w.pt"


def tensors(header: Any = None, length: int | None = None, **how: Any) -> Write:
    """A file of safetensors with this header, or that of one tensor."""
    return written("w.safetensors", safetensors(header or entry(**how), length=length))


WEIGHTS: dict[str, Write] = {
    "safetensors-empty": written("w.safetensors", b""),
    "safetensors-header-longer-than-the-file": tensors(length=2**20),
    "safetensors-header-of-2-63": tensors(length=2**63),
    "safetensors-header-that-is-no-json": tensors(b"{'w': 1}"),
    "safetensors-header-100000-deep": tensors(b'{"w":' + b"[" * 100_000),
    "safetensors-unknown-type": tensors(dtype="OBJ"),
    "safetensors-shape-that-overflows": tensors(shape=(2**62, 2**62)),
    "safetensors-negative-shape": tensors(shape=(-4, 4)),
    "safetensors-offsets-past-the-end": tensors(shape=(2**30,), offsets=(0, 2**32)),
    "safetensors-offsets-backwards": tensors(offsets=(64, 0)),
    "safetensors-another-models": written("w.safetensors", save({"w": torch.zeros(4, 4)})),
    "safetensors-is-a-pickle": raw_pickle("w.safetensors"),
    "pt-is-a-pickle-that-runs": raw_pickle("w.pt"),
    "bin-is-a-zipped-pickle-that-runs": zipped_pickle("w.bin"),
    "pt-bomb": torch_bomb,
    "pt-tensor-of-4-terabytes": huge_tensor,
    "pt-noise": written("w.pt", noise(4000)),
    "pt-is-a-link-to-endless-zeros": link("/dev/zero", "w.pt"),
}


# -- model folders


def model(
    change: Callable[[dict[str, Any]], object] = lambda card: None,
    state: bytes | None = None,
    card_text: str | None = None,
) -> Write:
    """A folder as `train` writes it, with something changed."""

    def write(folder: Path) -> Path:
        path = tiny.write_model(folder / "model")
        card = json.loads((path / "model.json").read_text())
        change(card)
        (path / "model.json").write_text(json.dumps(card) if card_text is None else card_text)
        if state is not None:
            (path / "model.safetensors").write_bytes(state)
        return path

    return write


def pickled_model(folder: Path) -> Path:
    return Path(model(state=pickle_that_touches(folder.parent / "ran"))(folder))


def lora(**change: Any) -> Callable[[dict[str, Any]], object]:
    return lambda card: card["regime"].update({"kind": "lora", **change})


MODELS: dict[str, Write] = {
    "model-unknown-setting": model(lambda card: card["backbone"].update(command="ls")),
    "model-tile-is-text": model(lambda card: card["backbone"].update(tile="x")),
    "model-rank-of-a-billion": model(lora(rank=10**9)),
    "model-blocks-that-are-not-there": model(lambda card: card["backbone"].update(blocks=[10**6])),
    "model-backbone-is-a-file-that-is-none": model(
        lambda card: card["backbone"].update(source="file", file="/etc/passwd")
    ),
}

STARTS: dict[str, Write] = {
    "model-card-nested-100000-deep": model(card_text="[" * 100_000),
    "model-card-is-a-list": model(card_text="[]"),
    "model-card-without-weights": model(lambda card: card.pop("weights")),
    "model-arch-is-a-list": model(lambda card: card["backbone"].update(arch=["tiny_dinov2"])),
    "model-head-is-a-list": model(lambda card: card.update(head=["linear"])),
    "model-head-of-another-kind": model(lambda card: card.update(head="deconv")),
    "model-tensors-of-another": model(state=save({"head.x": torch.zeros(2)})),
    "model-tensors-are-a-pickle": pickled_model,
}
