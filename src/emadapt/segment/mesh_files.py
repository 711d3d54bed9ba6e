"""Surfaces as files: binary PLY, OBJ, binary STL. Small formats; no package that emadapt needs anyway writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

import emadapt

LINES = 100_000  # of text that are put together at once


@dataclass(frozen=True)
class Mesh:
    """Triangles.

    Attributes:
        vertices: (V, 3) float32: x, y, z in nm.
        faces: (F, 3) int32: three vertices each, counter-clockwise as seen from outside.
    """

    vertices: npt.NDArray[np.float32]
    faces: npt.NDArray[np.int32]


def area_nm2(mesh: Mesh) -> float:
    """Area of the triangles."""
    return float(np.linalg.norm(_crossed(mesh), axis=1).sum() / 2)


def volume_nm3(mesh: Mesh) -> float:
    """Volume within a closed surface, positive where its normals look outwards (divergence theorem)."""
    centred = mesh.vertices - mesh.vertices.mean(0, dtype=float)
    a, b, c = (centred[mesh.faces[:, i]] for i in range(3))
    return float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)


def write_mesh(path: Path, mesh: Mesh, about: str) -> None:
    """Write a surface in the format of the name's suffix, a key of `WRITERS`: whole or not at all.

    Args:
        path: to write.
        mesh: the surface.
        about: where it comes from, kept as a comment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            WRITERS[path.suffix.lower()](file, mesh, " ".join(about.split()))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _crossed(mesh: Mesh) -> npt.NDArray[np.float64]:
    """(F, 3) normals as long as twice the triangles' areas."""
    a, b, c = (mesh.vertices[mesh.faces[:, i]].astype(float) for i in range(3))
    return np.cross(b - a, c - a)


def _ply(file: BinaryIO, mesh: Mesh, about: str) -> None:
    """Polygon file format, binary, little-endian (Turk 1994)."""
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment emadapt {emadapt.__version__}: {about}",
        "comment x y z in nm, the centre of the first voxel at 0 0 0",
        f"element vertex {len(mesh.vertices)}",
        "property float x",
        "property float y",
        "property float z",
        f"element face {len(mesh.faces)}",
        "property list uchar int vertex_indices",
        "end_header",
    ]
    file.write(("\n".join(header) + "\n").encode())
    file.write(mesh.vertices.astype("<f4").tobytes())
    rows = np.empty(len(mesh.faces), [("n", "u1"), ("vertices", "<i4", 3)])
    rows["n"], rows["vertices"] = 3, mesh.faces
    file.write(rows.tobytes())


def _obj(file: BinaryIO, mesh: Mesh, about: str) -> None:
    """Wavefront OBJ: text, vertices numbered from 1."""
    file.write(
        f"# emadapt {emadapt.__version__}: {about}\n# x y z in nm, the centre of the first voxel at 0 0 0\n".encode()
    )
    for word, rows, form in (("v", mesh.vertices, "%.9g"), ("f", mesh.faces + 1, "%d")):
        line = f"{word} {form} {form} {form}\n"
        for start in range(0, len(rows), LINES):
            part = rows[start : start + LINES]
            file.write((line * len(part) % tuple(part.ravel().tolist())).encode())


def _stl(file: BinaryIO, mesh: Mesh, about: str) -> None:
    """Binary STL: triangles with their normals, each with vertices of its own."""
    file.write(f"emadapt {emadapt.__version__}: x y z in nm; {about}".encode()[:80].ljust(80))
    file.write(np.uint32(len(mesh.faces)).astype("<u4").tobytes())
    normals = _crossed(mesh)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
    rows = np.zeros(
        len(mesh.faces), [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("unused", "<u2")]
    )
    rows["normal"], rows["corners"] = normals, mesh.vertices[mesh.faces]
    file.write(rows.tobytes())


WRITERS: dict[str, Callable[[BinaryIO, Mesh, str], None]] = {
    ".ply": _ply,
    ".obj": _obj,
    ".stl": _stl,
}
"""Formats by the suffix of the file's name."""
