"""Hostile and damaged volumes: HDF5, Zarr, and what a folder may hold that is no file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr as typed_zarr
from images import GREY, zeros

zarr: Any = typed_zarr  # its types are narrower than what it takes
Write = Callable[[Path], Path | str]


def made(name: str, make: Callable[[Path], object]) -> Write:
    """What is no file, by a function that makes it."""

    def write(folder: Path) -> Path:
        make(folder / name)
        return folder / name

    return write


# -- HDF5


def hdf5(**how: Any) -> Write:
    """A file with one dataset, `how` as h5py's create_dataset takes it."""

    def write(folder: Path) -> Path:
        with h5py.File(folder / "a.h5", "w") as file:
            file.create_dataset("raw", **how)
        return folder / "a.h5"

    return write


def with_attributes(**attributes: Any) -> Write:
    def write(folder: Path) -> Path:
        with h5py.File(folder / "a.h5", "w") as file:
            file.create_dataset("raw", data=GREY).attrs.update(attributes)
        return folder / "a.h5"

    return write


def changed(content: Callable[[bytes], bytes]) -> Write:
    def write(folder: Path) -> Path:
        with h5py.File(folder / "a.h5", "w") as file:
            file.create_dataset("raw", data=GREY, chunks=(1, 24, 32), compression="gzip")
        path = folder / "a.h5"
        path.write_bytes(content(path.read_bytes()))
        return path

    return write


def raw_data_outside(folder: Path) -> Path:
    """The values are the bytes of another file."""
    (folder.parent / "secret.bin").write_bytes(GREY.tobytes())
    return hdf5(shape=GREY.shape, dtype="u1", external=[("../secret.bin", 0, GREY.size)])(folder)  # type: ignore[return-value]


def virtual_outside(folder: Path) -> Path:
    with h5py.File(folder.parent / "secret.h5", "w") as file:
        file["raw"] = GREY
    layout = h5py.VirtualLayout(GREY.shape, "u1")
    layout[:] = h5py.VirtualSource("../secret.h5", "raw", GREY.shape)
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_virtual_dataset("raw", layout)
    return folder / "a.h5"


def link_outside(folder: Path) -> str:
    with h5py.File(folder.parent / "secret.h5", "w") as file:
        file["raw"] = GREY
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
    with h5py.File(folder / "a.h5", "w") as file:
        data = file.create_dataset(
            "raw", (3, 32768, 32768), "u1", chunks=(3, 32768, 32768), compression="gzip"
        )
        data.id.write_direct_chunk((0, 0, 0), zeros(3 * 1024))
    return folder / "a.h5"


HDF5S: dict[str, Write] = {
    "hdf5-empty": changed(lambda raw: b""),
    "hdf5-noise": changed(lambda raw: raw[:8] + np.random.default_rng(3).bytes(3000)),
    "hdf5-truncated": changed(lambda raw: raw[:-700]),
    "hdf5-damaged-chunks": changed(lambda raw: raw.replace(b"\x78\x5e", b"\0\0")),
    "hdf5-a-trillion-voxels": hdf5(shape=(2**40, 2**20, 2**22), dtype="u1", chunks=(1, 64, 64)),
    "hdf5-never-written": hdf5(shape=(3, 60000, 60000), dtype="u1"),
    "hdf5-chunk-bomb": chunk_bomb,
    "hdf5-no-slices": hdf5(shape=(0, 24, 32), dtype="u1"),
    "hdf5-text": hdf5(
        data=np.array([[["a"] * 5] * 5] * 3, dtype=object), dtype=h5py.string_dtype()
    ),
    "hdf5-records": hdf5(data=np.zeros((3, 24, 32), [("a", "u1"), ("b", "f4")])),
    "hdf5-complex": hdf5(data=np.zeros((3, 24, 32), np.complex64)),
    "hdf5-raw-data-in-a-file-outside": raw_data_outside,
    "hdf5-virtual-data-in-a-file-outside": virtual_outside,
    "hdf5-link-to-a-file-outside": link_outside,
    "hdf5-links-in-a-circle": links_in_a_circle,
    "hdf5-axes-of-another-number": with_attributes(axistags=json.dumps({"axes": [{"key": "z"}]})),
    "hdf5-axes-that-are-no-text": with_attributes(
        axistags=json.dumps({"axes": [{"key": [1]}] * 3})
    ),
    "hdf5-infinite-voxels": with_attributes(element_size_um=[np.inf, 1.0, 1.0]),
    "hdf5-voxels-of-light-years": with_attributes(element_size_um=[9e74, 1.0, 1.0]),
}


# -- Zarr


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


def v2(content: bytes = GREY[0].tobytes(), **change: Any) -> Write:
    """A Zarr of format 2 by hand, with one chunk."""

    def write(folder: Path) -> Path:
        path = folder / "a.zarr"
        path.mkdir()
        (path / ".zarray").write_text(json.dumps(V2 | change))
        (path / "0.0.0").write_bytes(content)
        return path

    return write


def metadata(text: str, name: str = ".zarray") -> Write:
    def write(folder: Path) -> Path:
        (folder / "a.zarr").mkdir()
        (folder / "a.zarr" / name).write_text(text)
        return folder / "a.zarr"

    return write


def pickled_chunk(folder: Path) -> Path:
    """numcodecs has a codec that is pickle."""
    return v2(
        pickle_that_touches(folder.parent / "ran"), filters=[{"id": "pickle", "protocol": 2}]
    )(folder)  # type: ignore[return-value]


def pickled_objects(folder: Path) -> Path:
    filters = [{"id": "pickle", "protocol": 2}]
    return v2(pickle_that_touches(folder.parent / "ran"), dtype="|O", filters=filters)(folder)  # type: ignore[return-value]


def pickle_that_touches(path: Path) -> bytes:
    """A pickle, written by hand, that creates a file when it is loaded."""
    return b"cposix\nsystem\n(S'touch " + str(path).encode() + b"'\ntR."


def image(change: dict[str, Any]) -> Write:
    """OME-Zarr whose metadata say something else than what is there."""

    def write(folder: Path) -> Path:
        group = zarr.create_group(folder / "a.zarr", zarr_format=2)
        group.create_array("0", data=GREY)
        zarr.save_array(str(folder.parent / "secret.zarr"), GREY)
        axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
        group.attrs["multiscales"] = [
            {"version": "0.4", "axes": axes, "datasets": [{"path": "0"}]} | change
        ]
        return folder / "a.zarr"

    return write


def endless_chunk(folder: Path) -> Path:
    path = Path(v2()(folder))
    os.remove(path / "0.0.0")
    os.symlink("/dev/zero", path / "0.0.0")
    return path


def chunk_nowhere(folder: Path) -> Path:
    path = Path(v2()(folder))
    os.remove(path / "0.0.0")
    os.symlink("nowhere", path / "0.0.0")
    return path


def pipe_as_chunk(folder: Path) -> Path:
    path = Path(v2()(folder))
    os.remove(path / "0.0.0")
    os.mkfifo(path / "0.0.0")
    return path


def zstd_bomb(folder: Path) -> Path:
    """Two gigabytes of zeros in one chunk of some kilobytes."""
    from numcodecs import Zstd

    packed = Zstd(1).encode(np.zeros(2**31 - 2**20, np.uint8))
    side = 2**15
    change = {
        "shape": [1, side, 2 * side - 32],
        "chunks": [1, side, 2 * side - 32],
        "compressor": {"id": "zstd", "level": 1},
    }
    return Path(v2(packed, **change)(folder))


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
    "zarr-chunks-larger-than-memory": v2(shape=[60000, 60000, 60000], chunks=[60000, 60000, 60000]),
    "zarr-zstd-bomb": zstd_bomb,
    "zarr-short-chunk": v2(content=b"abc"),
    "zarr-unknown-codec": v2(compressor={"id": "nonsense"}),
    "zarr-damaged-blosc": v2(content=b"\2\1\x21\1" + bytes(range(60)), compressor={"id": "blosc"}),
    "zarr-objects": pickled_objects,
    "zarr-filter-is-pickle": pickled_chunk,
    "zarr-dates": v2(dtype="<M8[s]"),
    "zarr-chunk-is-a-link-to-endless-zeros": endless_chunk,
    "zarr-chunk-is-a-pipe": pipe_as_chunk,
    "ome-zarr-array-outside": image({"datasets": [{"path": "../../secret.zarr"}]}),
    "ome-zarr-no-list": image({"datasets": "0"}),
    "ome-zarr-axes-of-another-number": image({"axes": [{"name": "z"}]}),
    "ome-zarr-scale-of-text": image(
        {
            "datasets": [
                {
                    "path": "0",
                    "coordinateTransformations": [{"type": "scale", "scale": ["a", "b", "c"]}],
                }
            ]
        }
    ),
    "ome-zarr-infinite-scale": image(
        {
            "datasets": [
                {
                    "path": "0",
                    "coordinateTransformations": [{"type": "scale", "scale": [float("inf"), 1, 1]}],
                }
            ]
        }
    ),
    "ome-zarr-images-by-name": metadata(json.dumps({"zarr_format": 2}), ".zgroup"),
}


INGESTED: dict[str, Write] = {
    "zarr-chunk-is-a-link-to-nothing": chunk_nowhere,
}


# -- files that are none


def link(target: str, name: str = "a.tif") -> Write:
    def write(folder: Path) -> Path:
        os.symlink(target, folder / name)
        return folder / name

    return write


def pipe(name: str) -> Write:
    def write(folder: Path) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    return write


def slices_with(make: Callable[[Path], object]) -> Write:
    def write(folder: Path) -> Path:
        (folder / "slices").mkdir()
        make(folder / "slices" / "s_1.png")
        return folder / "slices"

    return write


PATHS: dict[str, Write] = {
    "link-to-itself": link("a.tif"),
    "link-to-nothing": link("nowhere.tif"),
    "link-to-endless-zeros": link("/dev/zero"),
    "hdf5-link-to-endless-zeros": link("/dev/zero", "a.h5"),
    "pipe-called-tif": pipe("a.tif"),
    "pipe-called-png": pipe("a.png"),
    "pipe-called-h5": pipe("a.h5"),
    "slices-one-is-a-folder": slices_with(lambda p: p.mkdir()),
    "slices-one-is-a-pipe": slices_with(os.mkfifo),
    "slices-one-is-endless": slices_with(lambda p: p.symlink_to("/dev/zero")),
    "name-with-a-null": lambda f: f"{f}/a\0.tif",
    "name-of-5000-letters": lambda f: f"{f}/{'a' * 5000}.tif",
}
