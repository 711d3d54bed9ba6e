"""Where the files of a dataset are.

A layout is a function here, an entry of `LAYOUTS`, and a name in the setting `layout` of a dataset
(`study/datasets.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emadapt.data.pairing import Part, slices_part, stack_part, volume_parts
from emadapt.errors import InputError
from emadapt.study.datasets import DatasetSettings


def parts_of(root: Path, spec: DatasetSettings) -> list[Part]:
    """The volumes of a dataset: of its files in `root`, see `find_parts`, or made by a seed."""
    if spec.synthetic:
        from emadapt.data.synthetic import synthetic_parts  # SciPy

        return synthetic_parts(spec.domains, spec.seed, spec.voxel_nm)
    return find_parts(root, spec.layout, spec.pairing, labelled=spec.labelled)


def find_parts(root: Path, layout: str, pairing: str, *, labelled: bool = True) -> list[Part]:
    """The volumes of a dataset with their labels.

    Args:
        root: the dataset's folder.
        layout: a key of `LAYOUTS`.
        pairing: a key of `pairing.PAIRINGS`; stacks pair slice by slice.
        labelled: False: images alone.

    Returns:
        One part called `all`, or `train` and `test`; of many volumes a part for each.

    Raises:
        InputError: a folder or file is missing, empty or unpaired.
    """
    check_folder(root, layout)
    return LAYOUTS[layout](root, pairing, labelled)


def check_folder(root: Path, layout: str) -> None:
    """Raise InputError where the folder of a dataset is not there."""
    if not root.is_dir():
        raise InputError(
            root,
            found="no such folder",
            expected=f"a dataset in layout `{layout}`",
            do="Put the files there, or correct `path`. Of a public dataset: `emadapt fetch`, or "
            "`dvc pull`.",
        )


def lucchi(root: Path, pairing: str, labelled: bool) -> list[Part]:
    """Train_In with Train_Out, Test_In with Test_Out."""
    train = slices_part("train", root / "Train_In", root / "Train_Out", pairing, labelled=labelled)
    test = slices_part("test", root / "Test_In", root / "Test_Out", pairing, labelled=labelled)
    return [train, test]


def vnc(root: Path, pairing: str, labelled: bool) -> list[Part]:
    """Folder raw with folder mitochondria."""
    return [slices_part("all", root / "raw", root / "mitochondria", pairing, labelled=labelled)]


def folders(root: Path, pairing: str, labelled: bool) -> list[Part]:
    """Folder images with folder labels, in the folder itself or in its train and test."""
    return [
        slices_part(name, place / "images", place / "labels", pairing, labelled=labelled)
        for name, place in _halves(root)
    ]


def stack(root: Path, pairing: str, labelled: bool) -> list[Part]:
    """One file image and one file label, in the folder itself or in its train and test."""
    return [stack_part(name, place, labelled=labelled) for name, place in _halves(root)]


def volumes(root: Path, pairing: str, labelled: bool) -> list[Part]:
    """Many volumes in folder images, with folder labels, in the folder or its train and test."""
    return [
        part
        for name, place in _halves(root)
        for part in volume_parts(name, place / "images", place / "labels", labelled=labelled)
    ]


def _halves(root: Path) -> list[tuple[str, Path]]:
    """Folders train and test if either is there, else the folder itself."""
    halves = [(name, root / name) for name in ("train", "test")]
    return halves if any(place.is_dir() for _, place in halves) else [("all", root)]


LAYOUTS: dict[str, Callable[[Path, str, bool], list[Part]]] = {
    "lucchi": lucchi,
    "vnc": vnc,
    "folders": folders,
    "stack": stack,
    "volumes": volumes,
}
"""(Folder, pairing, whether there are labels) -> parts."""
