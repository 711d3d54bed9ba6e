"""Hostile and damaged volumes: HDF5, Zarr, and what a folder may hold that is no file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr as typed_zarr
from files import GREY, Write, link, made, noise, pickle_that_touches, zeros

zarr: Any = typed_zarr  # its types are narrower than what it takes


def hdf5(**how: Any) -> Write:
    """A file with one dataset, `how` as h5py's create_dataset takes it."""

    def make(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.create_dataset("raw", **how)

    return made("a.h5", make)


def with_attributes(**attributes: Any) -> Write:
    def make(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.create_dataset("raw", data=GREY).attrs.update(attributes)

    return made("a.h5", make)


def changed(content: Callable[[bytes], bytes]) -> Write:
    def make(path: Path) -> None:
        hdf5(data=GREY, chunks=(1, 24, 32), compression="gzip")(path.parent)
        path.write_bytes(content(path.read_bytes()))

    return made("a.h5", make)


def raw_data_outside(folder: Path) -> Path | str:
    """The values are the bytes of another file."""
    (folder.parent / "secret.bin").write_bytes(GREY.tobytes())
    outside = [("../secret.bin", 0, GREY.size)]
    return hdf5(shape=GREY.shape, dtype="u1", external=outside)(folder)


def secret(folder: Path) -> None:
    with h5py.File(folder.parent / "secret.h5", "w") as file:
        file["raw"] = GREY


def virtual_outside(folder: Path) -> Path:
    secret(folder)
    layout = h5py.VirtualLayout(GREY.shape, "u1")
    layout[:] = h5py.VirtualSource("../secret.h5", "raw", GREY.shape)
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_virtual_dataset("raw", layout)
    return folder / "a.h5"


def link_outside(folder: Path) -> str:
    secret(folder)
    with h5py.File(folder / "a.h5", "w") as file:
        file["raw"] = h5py.ExternalLink("../secret.h5", "raw")
    return f"{folder / 'a.h5'}:/raw"


def links_in_a_circle(folder: Path) -> str:
    with h5py.File(folder / "a.h5", "w") as file:
        group = file.create_group("g")
        group["again"] = group
        file["x"], file["y"] = h5py.SoftLink("/y"), h5py.SoftLink("/x")
    return f"{folder / 'a.h5'}:/x"


def chunk_bomb(folder: Path) -> Path:
    """One chunk of 3 GB of zeros, deflated to nothing."""
    shape = 3, 32768, 32768
    with h5py.File(folder / "a.h5", "w") as file:
        data = file.create_dataset("raw", shape, "u1", chunks=shape, compression="gzip")
        data.id.write_direct_chunk((0, 0, 0), zeros(3 * 1024))
    return folder / "a.h5"


TEXT = np.array([[["a"] * 5] * 5] * 3, dtype=object)
HDF5S: dict[str, Write] = {
    "hdf5-empty": changed(lambda raw: b""),
    "hdf5-noise": changed(lambda raw: raw[:8] + noise(3000)),
    "hdf5-truncated": changed(lambda raw: raw[:-700]),
    "hdf5-damaged-chunks": changed(lambda raw: raw.replace(b"\x78\x5e", b"\0\0")),
    "hdf5-a-trillion-voxels": hdf5(shape=(2**40, 2**20, 2**22), dtype="u1", chunks=(1, 64, 64)),
    "hdf5-never-written": hdf5(shape=(3, 60000, 60000), dtype="u1"),
    "hdf5-chunk-bomb": chunk_bomb,
    "hdf5-no-slices": hdf5(shape=(0, 24, 32), dtype="u1"),
    "hdf5-text": hdf5(data=TEXT, dtype=h5py.string_dtype()),
    "hdf5-records": hdf5(data=np.zeros((3, 24, 32), [("a", "u1"), ("b", "f4")])),
    "hdf5-raw-data-in-a-file-outside": raw_data_outside,
    "hdf5-virtual-data-in-a-file-outside": virtual_outside,
    "hdf5-link-to-a-file-outside": link_outside,
    "hdf5-links-in-a-circle": links_in_a_circle,
    "hdf5-axes-of-another-number": with_attributes(axistags='{"axes": [{"key": "z"}]}'),
    "hdf5-axes-that-are-no-text": with_attributes(
        axistags=json.dumps({"axes": [{"key": [1]}] * 3})
    ),
    "hdf5-infinite-voxels": with_attributes(element_size_um=[np.inf, 1.0, 1.0]),
    "hdf5-voxels-of-light-years": with_attributes(element_size_um=[9e74, 1.0, 1.0]),
}

V2 = {
    "zarr_format": 2,
    "shape": [3, 24, 32],
    "chunks": [1, 24, 32],
    "dtype": "|u1",
    "compressor": None,
    "fill_value": 0,
    "order": "C",
    "filters": None,
}
PICKLED = {"filters": [{"id": "pickle", "protocol": 2}]}


def v2(
    content: bytes = GREY[0].tobytes(), chunk: Callable[[Path], object] | None = None, **change: Any
) -> Write:
    """A Zarr of format 2 by hand, with one chunk of this content, or what a function makes."""

    def make(path: Path) -> None:
        path.mkdir()
        (path / ".zarray").write_text(json.dumps(V2 | change))
        (chunk or (lambda file: file.write_bytes(content)))(path / "0.0.0")

    return made("a.zarr", make)


def metadata(text: str, name: str = ".zarray") -> Write:
    def make(path: Path) -> None:
        path.mkdir()
        (path / name).write_text(text)

    return made("a.zarr", make)


def pickled(**change: Any) -> Write:
    """A chunk that is a pickle, which numcodecs would load."""
    return lambda folder: v2(pickle_that_touches(folder.parent / "ran"), **PICKLED | change)(folder)


def image(**change: Any) -> Write:
    """OME-Zarr whose metadata say something else than what is there."""

    def make(path: Path) -> None:
        group = zarr.create_group(path, zarr_format=2)
        group.create_array("0", data=GREY)
        zarr.save_array(str(path.parent.parent / "secret.zarr"), GREY)
        axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
        plain = {"version": "0.4", "axes": axes, "datasets": [{"path": "0"}]}
        group.attrs["multiscales"] = [plain | change]

    return made("a.zarr", make)


def scaled(*scale: Any) -> Write:
    changes = [{"type": "scale", "scale": list(scale)}]
    return image(datasets=[{"path": "0", "coordinateTransformations": changes}])


def zstd_bomb(folder: Path) -> Path | str:
    """Two gigabytes of zeros in one chunk of some kilobytes."""
    from numcodecs import Zstd

    shape = [1, 2**15, 2**16 - 32]
    packed = Zstd(1).encode(np.zeros(2**31 - 2**20, np.uint8))
    return v2(packed, shape=shape, chunks=shape, compressor={"id": "zstd", "level": 1})(folder)


HUGE = [60000, 60000, 60000]
ZARRS: dict[str, Write] = {
    "zarr-empty-folder": made("a.zarr", Path.mkdir),
    "zarr-no-json": metadata("{"),
    "zarr-list": metadata("[]"),
    "zarr-nested-100000-deep": metadata("[" * 100_000),
    "zarr-version-99": metadata('{"zarr_format": 99, "node_type": "array"}', "zarr.json"),
    "zarr-negative-shape": v2(shape=[-3, 24, 32]),
    "zarr-shape-of-text": v2(shape=["a", 24, 32]),
    "zarr-a-quintillion-voxels": v2(shape=[2**40, 2**30, 2**30]),
    "zarr-chunks-of-nothing": v2(chunks=[0, 0, 0]),
    "zarr-chunks-of-another-number": v2(chunks=[24, 32]),
    "zarr-chunks-larger-than-memory": v2(shape=HUGE, chunks=HUGE),
    "zarr-zstd-bomb": zstd_bomb,
    "zarr-short-chunk": v2(content=b"abc"),
    "zarr-unknown-codec": v2(compressor={"id": "nonsense"}),
    "zarr-damaged-blosc": v2(content=b"\2\1\x21\1" + bytes(range(60)), compressor={"id": "blosc"}),
    "zarr-objects": pickled(dtype="|O"),
    "zarr-filter-is-pickle": pickled(),
    "zarr-dates": v2(dtype="<M8[s]"),
    "zarr-chunk-is-a-link-to-endless-zeros": v2(chunk=lambda p: os.symlink("/dev/zero", p)),
    "zarr-chunk-is-a-link-to-nothing": v2(chunk=lambda p: os.symlink("nowhere", p)),
    "zarr-chunk-is-a-pipe": v2(chunk=os.mkfifo),
    "ome-zarr-array-outside": image(datasets=[{"path": "../../secret.zarr"}]),
    "ome-zarr-no-list": image(datasets="0"),
    "ome-zarr-axes-of-another-number": image(axes=[{"name": "z"}]),
    "ome-zarr-scale-of-text": scaled("a", "b", "c"),
    "ome-zarr-infinite-scale": scaled(float("inf"), 1, 1),
}


def slices_with(make: Callable[[Path], object]) -> Write:
    def write(folder: Path) -> None:
        folder.mkdir()
        make(folder / "s_1.png")

    return made("slices", write)


PATHS: dict[str, Write] = {
    "link-to-itself": link("a.tif"),
    "link-to-nothing": link("nowhere.tif"),
    "link-to-endless-zeros": link("/dev/zero"),
    "hdf5-link-to-endless-zeros": link("/dev/zero", "a.h5"),
    "pipe-called-tif": made("a.tif", os.mkfifo),
    "pipe-called-png": made("a.png", os.mkfifo),
    "pipe-called-h5": made("a.h5", os.mkfifo),
    "slices-one-is-a-folder": slices_with(Path.mkdir),
    "slices-one-is-a-pipe": slices_with(os.mkfifo),
    "slices-one-is-endless": slices_with(lambda p: p.symlink_to("/dev/zero")),
    "name-with-a-null": lambda folder: f"{folder}/a\0.tif",
    "name-of-5000-letters": lambda folder: f"{folder}/{'a' * 5000}.tif",
}
