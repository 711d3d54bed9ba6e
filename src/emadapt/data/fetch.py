"""Get a public dataset into `data/`: download and unpack it, or take it from a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from emadapt.data.layouts import find_parts
from emadapt.data.sources import DATASETS, SOURCE, Archive, Dataset
from emadapt.errors import InputError
from emadapt.files import whole_folder, write_json
from emadapt.volumes.folder import SLICE_SUFFIXES

TIMEOUT_S = 8.0  # for a connection and for each read: without a network the error comes in seconds
UNCHECKED = "a local folder, contents not checked against the published archive"


def fetch(
    name: str,
    root: Path = Path("data"),
    from_dir: Path | None = None,
    force: bool = False,
    downloads: Path = Path("scratch/downloads"),
) -> Path:
    """Put a public dataset under `root/name`, complete or not at all, with a `SOURCE.json`.

    Args:
        name: a key of `DATASETS`; files of one without archive must be there already.
        root: folder of the raw data.
        from_dir: folder to take it from instead of the network, with a subfolder or without.
        force: replace what is there.
        downloads: outside of `root`, which is versioned.

    Raises:
        InputError: unknown name, a dataset to be downloaded by hand (says how), no network, wrong
            sha256, files that are not in the layout.
    """
    if name not in DATASETS:
        raise InputError(
            f"dataset {name!r}",
            found="an unknown name",
            expected=f"one of {', '.join(DATASETS)}",
            do="Your own data needs no fetch: put it under data/ and describe it in params.yaml.",
        )
    dataset, target = DATASETS[name], root / name
    if dataset.archive is None:
        return _by_hand(dataset, target)
    if target.exists() and not force:
        slices = _check_complete(dataset, target, "Use --force to replace it.")
        print(f"{target}: already there, {slices} slices (use --force to replace it)")
        return target
    archive, unpacked = dataset.archive, downloads / name
    origin, sha256, checked = UNCHECKED, None, f"from {UNCHECKED}"
    if from_dir is None:
        _download(dataset, archive, unpacked)
        origin, sha256, checked = archive.urls[0], archive.sha256, "sha256 as published"
    with whole_folder(target) as part:
        _copy(archive, _find(dataset, archive, from_dir or unpacked), part)
        slices = _check_complete(dataset, part, f"Give files in layout `{dataset.layout}`.")
        write_json(part / SOURCE, record_of(dataset) | {"origin": origin, "archive_sha256": sha256})
    if from_dir is None:
        shutil.rmtree(unpacked)
    print(f"{target}: {slices} slices, {checked}\n{_terms(dataset)}")
    return target


def _by_hand(dataset: Dataset, target: Path) -> Path:
    """The folder of a dataset that somebody has put there; the error says how to."""
    do = f"Download by hand into {target}/: {dataset.by_hand}."
    setting = f"In params.yaml: {dataset.name}: {dataset.settings}"
    if not target.exists():
        found, expected = "nothing that emadapt can download", f"its files in {target}/"
        what = f"dataset {dataset.name!r}"
        raise InputError(what, found=found, expected=expected, do=f"{do} {setting}")
    slices = _check_complete(dataset, target, do)
    origin = {"origin": dataset.by_hand, "archive_sha256": None}
    write_json(target / SOURCE, record_of(dataset) | origin)
    print(f"{target}: already there, {slices} slices; {setting}\n{_terms(dataset)}")
    return target


def _check_complete(dataset: Dataset, folder: Path, do: str) -> int:
    """The number of slices in a dataset's folder, if nothing is missing or unpaired."""
    try:
        return sum(part.depth for part in find_parts(folder, dataset.layout, "number"))
    except InputError as error:
        found = f"an incomplete dataset ({error.what}: {error.found})"
        raise InputError(folder, found=found, expected=error.expected, do=do) from None


def record_of(dataset: Dataset) -> dict[str, Any]:
    """No date and no local path: the same data is the same bytes wherever it was fetched."""
    facts = {key: getattr(dataset, key) for key in ("name", "licence", "citation", "doi")}
    return facts | {"voxel_nm": list(dataset.voxel_nm)}


def _terms(dataset: Dataset) -> str:
    return f"  {dataset.note}\n  licence: {dataset.licence}\n  cite: {dataset.citation}"


def _find(dataset: Dataset, archive: Archive, from_dir: Path) -> Path:
    """The folder that has the layout: `from_dir` or one in it."""
    for folder in (from_dir / dataset.name, from_dir / archive.root, from_dir):
        if any((folder / name).is_dir() for name in archive.folders):
            return folder
    there = sorted(p.name for p in from_dir.iterdir()) if from_dir.is_dir() else []
    raise InputError(
        from_dir,
        found=", ".join(there[:5]) or "nothing",
        expected=f"the folders {', '.join(archive.folders)}, there or in {dataset.name}/",
        do="Check the path of --from.",
    )


def _copy(archive: Archive, folder: Path, to: Path) -> None:
    """The slices of a folder; contents alone, since the source may be read-only."""
    for name in archive.folders:
        (to / name).mkdir()
        for file in sorted((folder / name).glob("*")):
            if file.suffix.lower() in SLICE_SUFFIXES:
                shutil.copyfile(file, to / name / file.name)


def _download(dataset: Dataset, archive: Archive, to: Path) -> None:
    """Download from the first address that gives the published bytes, and unpack."""
    import pooch
    import requests

    get = pooch.HTTPDownloader(timeout=TIMEOUT_S, progressbar=True)
    unzip = pooch.Unzip([f"{archive.root}/{name}" for name in archive.folders], extract_dir=".")
    shutil.rmtree(to / archive.root, ignore_errors=True)  # half of it, if a run was stopped
    problems = []
    for url in archive.urls:
        try:
            pooch.retrieve(url, archive.sha256, "archive.zip", to, unzip, get)
            return
        except (requests.RequestException, ValueError) as error:  # ValueError: wrong sha256
            problems.append(f"{url}: {error}")
    raise InputError(
        f"dataset {dataset.name!r}",
        found="; ".join(problems),
        expected="a download with the published sha256",
        do="Check the network, or get the data elsewhere and use"
        f" `emadapt fetch {dataset.name} --from DIR`,"
        f" where DIR holds {', '.join(archive.folders)}.",
    )
