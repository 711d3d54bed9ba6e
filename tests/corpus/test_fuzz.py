"""Files with some bytes changed are read or refused, soon and small.

EMADAPT_FUZZ is the number of changed files, 150 unless told; ten minutes are about 30000.
"""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import files
import h5py
import numpy as np
import pytest
import readers
import tifffile
import volumes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import tiny
from emadapt.models.archs import get_arch
from tiny import load_weights

EXAMPLES = int(os.environ.get("EMADAPT_FUZZ", "150"))
IMAGE = (readers.source,)


def write_all(folder: Path) -> None:
    """One good file of each kind."""
    rng = np.random.default_rng(0)
    grey, wide = files.GREY, rng.integers(0, 60000, (3, 24, 32)).astype(np.uint16)
    stacks: dict[str, dict[str, Any]] = {
        "plain": {},
        "big": {"bigtiff": True},
        "zlib": {"compression": "zlib"},
        "lzw": {"compression": "lzw"},
        "tiled": {"tile": (16, 16), "compression": "zlib"},
        "imagej": {"imagej": True, "metadata": {"axes": "ZYX"}},
        "predicted": {"compression": "zlib", "predictor": True},
    }
    for name, how in stacks.items():
        tifffile.imwrite(folder / f"{name}.tif", grey, photometric="minisblack", **how)
    tifffile.imwrite(
        folder / "a.ome.tif",
        wide,
        photometric="minisblack",
        metadata={"axes": "ZYX", "PhysicalSizeZ": 1},
    )
    Image.fromarray(grey[0]).save(folder / "grey.png")
    Image.fromarray(wide[0]).save(folder / "wide.png")
    Image.fromarray(np.stack([grey[0]] * 3, -1)).save(folder / "colours.png")
    for name, how in {
        "chunked": {"chunks": (1, 24, 32), "compression": "gzip"},
        "contiguous": {},
    }.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_dataset("raw", data=wide, **how).attrs["element_size_um"] = [
                0.03,
                0.005,
                0.005,
            ]
    for version in (2, 3):
        volumes.zarr.create_array(
            folder / f"v{version}.zarr", data=wide, chunks=(1, 24, 32), zarr_format=version
        )
    state, _ = load_weights("tiny_dinov2", "random")
    save_file(state, folder / "w.safetensors")
    tiny.write_model(folder / "model")
    (folder / "params.yaml").write_text(json.dumps(tiny.settings()))


TIFFS = ("plain", "big", "zlib", "lzw", "tiled", "imagej", "predicted", "a.ome")
TARGETS = {
    **{f"{name}.tif": (f"{name}.tif", IMAGE) for name in TIFFS},
    **{f"{name}.png": (f"{name}.png", IMAGE) for name in ("grey", "wide", "colours")},
    "chunked.h5": ("chunked.h5", (readers.source,)),
    "contiguous.h5": ("contiguous.h5", (readers.source,)),
    "v2.zarr/.zarray": ("v2.zarr", (readers.source,)),
    "v2.zarr/0.0.0": ("v2.zarr", (readers.source,)),
    "v3.zarr/zarr.json": ("v3.zarr", (readers.source,)),
    "v3.zarr/c/0/0/0": ("v3.zarr", (readers.source,)),
    "w.safetensors": ("w.safetensors", (readers.load, readers.look)),
    "model/model.json": ("model", (readers.model,)),
    "model/model.safetensors": ("model", (readers.model,)),
    "params.yaml": ("params.yaml", (readers.study,)),
}
"""File that is changed: (what is read, by whom)."""
NUMBERS = [
    struct.pack(f"<{kind}", value)
    for kind in "HIQ"
    for value in (0, 1, 2 ** (8 * struct.calcsize(kind)) - 1)
]
NEW = st.binary(min_size=1, max_size=4) | st.sampled_from([*NUMBERS, b"9", b"-", b"[", b"e9"])
CHANGES = st.lists(st.tuples(st.floats(0, 1), NEW), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_all(folder)
    assert get_arch("tiny_dinov2").depth
    for file, (target, reads) in TARGETS.items():
        for read in reads if file != "params.yaml" else ():  # its data are not there
            outcome = readers.meet(read, folder / target, folder)
            assert outcome.error == "", f"{file}: {outcome}"
    return folder


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    derandomize="EMADAPT_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    file=st.sampled_from(sorted(TARGETS)),
    changes=CHANGES,
    cut=st.none() | st.floats(0, 1),
    near=st.sampled_from([1, 3, 8]),
)
def test_changed_bytes(
    file: str,
    changes: list[tuple[float, bytes]],
    cut: float | None,
    near: int,
    good: Path,
    tmp_path: Path,
) -> None:
    """`near`: how much closer to the beginning than to the end, where headers are."""
    target, reads = TARGETS[file]
    folder = tmp_path / "here"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (shutil.copytree if (good / target).is_dir() else shutil.copyfile)(
        good / target, folder / target
    )
    raw = bytearray((good / file).read_bytes())
    for place, new in changes:
        at = int(place**near * len(raw))
        raw[at : at + len(new)] = new
    (folder / file).write_bytes(raw if cut is None else raw[: int(cut ** (1 / near) * len(raw))])
    for read in reads:
        outcome = readers.meet(read, folder / target, folder)
        assert outcome.clear or not outcome.error, outcome
        assert "MemoryError" not in outcome.message, outcome
        assert outcome.seconds < readers.SECONDS, outcome
        assert outcome.megabytes < readers.MEGABYTES, outcome
