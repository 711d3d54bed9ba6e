"""Get a public dataset into `data/`: download and unpack it, or take it from a folder. Nothing is there until all is."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shutil
import ssl
import stat
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
    track,
)

from emadapt.data.layouts import find_parts
from emadapt.data.sources import LAYOUTS, MANUAL, SOURCES, Manual, Source
from emadapt.errors import InputError

TIMEOUT_S = 8.0  # for a connection and for each read: an unreachable network is an error in seconds
TRIES = 6  # per address, as long as each brings something
PAUSE_S = 1.0
CHUNK = 1 << 18  # bytes
MAX_ARCHIVE = 4 << 30  # bytes, on the wire
MAX_UNPACKED = 8 << 30  # bytes
MAX_RATIO = (
    50  # unpacked to packed, over the wanted files; images that are compressed already stay below 3
)
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    TimeoutError,
    ConnectionError,
    ssl.SSLError,
)


def fetch(
    name: str,
    root: Path = Path("data"),
    from_dir: Path | None = None,
    force: bool = False,
    downloads: Path = Path("scratch/downloads"),
) -> Path:
    """Put a public dataset under `root/name`, in its own layout and with a `SOURCE.json` of where it is from.

    Args:
        name: a key of `SOURCES`, or of `MANUAL`: then the files must be there already.
        root: folder of the raw data.
        from_dir: take it from this folder (its subfolder `name`, the archive's folder, or itself) and not from the network.
        force: replace what is there.
        downloads: where unfinished downloads wait; outside of `root`, which is versioned.

    Returns:
        The dataset's folder.

    Raises:
        InputError: unknown name, a dataset of `MANUAL` that is not there (says how to get it), a folder that is not in the
            layout, no network, wrong sha256, an archive that is not safe to unpack.
    """
    if name in MANUAL:
        return _by_hand(MANUAL[name], Path(root) / name)
    if name not in SOURCES:
        raise InputError(
            f"dataset {name!r}",
            found="an unknown name",
            expected=f"one of {', '.join((*SOURCES, *MANUAL))}",
            do="Your own data needs no fetch: put it under data/ and describe it in params.yaml.",
        )
    source, target = SOURCES[name], Path(root) / name
    if target.exists() and not force:
        try:
            n = len(layout_files(source, target))
        except InputError as error:
            raise InputError(
                target,
                found=f"an incomplete dataset ({error.what}: {error.found})",
                expected=error.expected,
                do="Use --force to replace it.",
            ) from None
        print(f"{target}: already there, {n} files (use --force to replace it)")
        return target
    part = target.with_name(f".{name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        if from_dir is not None:
            folder, files = _find_layout(source, Path(from_dir))
            _copy(folder, files, part)
        else:
            archive = _download(source, Path(downloads))
            part.mkdir(parents=True)
            unpack(source, archive, part)
            files = layout_files(source, part)
            archive.unlink()
        (part / "SOURCE.json").write_text(_provenance(source, downloaded=from_dir is None))
        _swap(part, target)
    except OSError as error:
        raise InputError(
            target,
            found=f"it cannot be written ({error})",
            expected="room and permission to write",
            do="Free some space or check the permissions, then run it again.",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    checked = (
        "sha256 as published"
        if from_dir is None
        else "from a folder, not checked against the published archive"
    )
    print(
        f"{target}: {len(files)} files, {checked}\n  {source.note}\n  licence: {source.licence}\n  cite: {source.citation}"
    )
    return target


def _by_hand(source: Manual, target: Path) -> Path:
    """The folder of a dataset that somebody has put there; an error that says how to, where nobody has."""
    how = f"Download by hand. Page: {source.page}. Take: {source.files}. Put them into {target}/ as {source.place}."
    setting = f"In params.yaml: {source.name}: {source.settings}"
    if not target.exists():
        raise InputError(
            f"dataset {source.name!r}",
            found="nothing that emadapt can download",
            expected=f"its files in {target}/",
            do=f"{how} {setting}",
        )
    try:
        slices = sum(
            p.depth
            for p in find_parts(
                target, "folders" if "folders" in source.settings else "stack", "number"
            )
        )
    except InputError as error:
        raise InputError(error.what, found=error.found, expected=error.expected, do=how) from None
    print(
        f"{target}: already there, {slices} slices; {setting}\n  {source.note}\n  licence: {source.licence}\n"
        f"  cite: {source.citation}"
    )
    return target


def layout_files(source: Source, folder: Path) -> list[Path]:
    """The files of a dataset, checked against its layout: folders, names, and one label for each image.

    Returns:
        Paths relative to `folder`, sorted. Files that are not part of the layout are left out.

    Raises:
        InputError: something is missing, or a link leads out of the folder.
    """
    found: list[Path] = []
    inside = folder.resolve()
    for volume in LAYOUTS[source.layout]:
        numbers: list[dict[int, str]] = []
        for kind, directory, pattern in (
            ("images", volume.image_dir, volume.image_pattern),
            ("labels", volume.label_dir, volume.label_pattern),
        ):
            path = folder / directory
            do = f"Give the folder that holds {_tree(source)}."
            if not path.is_dir():
                raise InputError(
                    path, found="no such folder", expected=f"the {kind} of {source.name}", do=do
                )
            matches = {
                p.name: m for p in sorted(path.iterdir()) if (m := re.fullmatch(pattern, p.name))
            }
            if not matches:
                some = ", ".join(sorted(p.name for p in path.iterdir())[:3]) or "nothing"
                raise InputError(path, found=some, expected=f"files called {pattern}", do=do)
            for file in matches:
                real = (path / file).resolve()
                if not real.is_relative_to(inside) or not real.is_file():
                    raise InputError(
                        path / file,
                        found="a link out of the folder, or no file",
                        expected="a file",
                        do="Put the file itself there.",
                    )
            numbers.append({int(m.group(1)): file for file, m in matches.items()})
            if len(numbers[-1]) != len(matches):
                raise InputError(
                    path,
                    found=f"{len(matches)} files with {len(numbers[-1])} numbers",
                    expected="one file for each number",
                    do="Remove the copies.",
                )
            found += [Path(directory) / file for file in matches]
        images, labels = numbers
        if odd := sorted(images.keys() ^ labels.keys()):
            raise InputError(
                folder / volume.label_dir,
                found=f"{len(labels)} labels for {len(images)} images",
                expected="one label for each image",
                do=f"Complete slice {', '.join(map(str, odd[:8]))}{' ...' if odd[8:] else ''}.",
            )
    return sorted(found)


def _tree(source: Source) -> str:
    return ", ".join(f"{v.image_dir}/ and {v.label_dir}/" for v in LAYOUTS[source.layout])


def _find_layout(source: Source, from_dir: Path) -> tuple[Path, list[Path]]:
    if not from_dir.is_dir():
        raise InputError(
            from_dir,
            found="no such folder",
            expected=f"one with {_tree(source)}",
            do="Check the path of --from.",
        )
    for folder in (from_dir / source.name, from_dir / source.archive_root, from_dir):
        if any(
            (folder / d).is_dir()
            for v in LAYOUTS[source.layout]
            for d in (v.image_dir, v.label_dir)
        ):
            return folder, layout_files(source, folder)
    some = ", ".join(sorted(p.name for p in from_dir.iterdir())[:5]) or "nothing"
    raise InputError(
        from_dir,
        found=some,
        expected=f"{_tree(source)}, there or in {source.name}/",
        do="Check the path of --from.",
    )


def _copy(folder: Path, files: list[Path], to: Path) -> None:
    for file in track(files, description=f"copy {folder.name}", transient=True):
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, to / file)  # contents only: the source may be read-only


def _provenance(source: Source, downloaded: bool) -> str:
    """No date and no local path: the same data is the same bytes wherever it was fetched."""
    record = {
        "name": source.name,
        "licence": source.licence,
        "citation": source.citation,
        "origin": source.urls[0]
        if downloaded
        else "a local folder, contents not checked against the published archive",
        "archive_sha256": source.sha256 if downloaded else None,
        "voxel_nm": source.voxel_nm,
    }
    return json.dumps(record, indent=2) + "\n"


def _swap(part: Path, target: Path) -> None:
    """Put a finished folder in place; what was there stays until then."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _download(source: Source, folder: Path) -> Path:
    """Download from the first address that gives the right bytes; unfinished files stay for the next call."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = []
    for i, url in enumerate(source.urls):
        archive = (
            folder / f"{source.name}-{i}.zip"
        )  # one for each address: two servers' bytes never mix
        try:
            _download_one(url, archive)
        except NETWORK_ERRORS as error:
            problems.append(f"{url}: {getattr(error, 'reason', None) or error}")
            continue
        digest = _sha256(archive)
        if digest == source.sha256:
            return archive
        archive.unlink()  # or the next call would resume from wrong bytes
        problems.append(f"{url}: sha256 {digest}, not {source.sha256}")
    raise InputError(
        f"dataset {source.name!r}",
        found="; ".join(problems),
        expected="a download with the published sha256",
        do=f"Check the network, or get the data elsewhere and use `emadapt fetch {source.name} --from DIR`, "
        f"where DIR holds {_tree(source)}.",
    )


def _download_one(url: str, archive: Path) -> None:
    """Download with resume: a cut connection goes on where it ended, in this call and in the next."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(archive.stem, total=None)
        for attempt in range(TRIES):
            before = archive.stat().st_size if archive.exists() else 0
            try:
                if _receive(url, archive, before, progress, task):
                    return
                problem: Exception = ConnectionError("the connection was cut before the end")
            except urllib.error.HTTPError:
                raise  # the server's answer: asking again will not change it
            except NETWORK_ERRORS as error:
                problem = error
            if (archive.stat().st_size if archive.exists() else 0) <= before:
                raise problem
            time.sleep(PAUSE_S * min(attempt, 5))
        raise problem


def _receive(url: str, archive: Path, have: int, progress: Progress, task: TaskID) -> bool:
    """One request for the bytes from `have` on. Returns whether the file is complete now."""
    headers = {"User-Agent": "emadapt", "Accept-Encoding": "identity"} | (
        {"Range": f"bytes={have}-"} if have else {}
    )
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - an address of SOURCES, http or https
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
    except urllib.error.HTTPError as error:
        if (
            error.code == 416 and have
        ):  # no bytes from there on: it is complete, or not that file; the sha256 will tell
            return True
        raise
    with response:
        start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
        resumed = response.status == 206 and start is not None and int(start.group(1)) == have
        if response.status == 206 and not resumed:
            raise ConnectionError(
                f"the server answered with another range than asked for ({start})"
            )
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        if (total or 0) > MAX_ARCHIVE:
            raise ConnectionError(
                f"{total} bytes are more than this dataset can have ({MAX_ARCHIVE})"
            )
        progress.update(task, total=total, completed=have)
        with archive.open("ab" if resumed else "wb") as file:
            while block := response.read(CHUNK):
                file.write(block)
                have += len(block)
                progress.update(task, completed=have)
                if have > MAX_ARCHIVE:
                    raise ConnectionError(f"more than {MAX_ARCHIVE} bytes")
    return total is None or have == total


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(source: Source, archive: Path, to: Path) -> None:
    """Unpack a dataset's files, and nothing else, from its zip archive.

    Raises:
        InputError: not a zip, a path that leads out of the archive, a link, or more data than an archive of images can hold.
    """

    def refuse(found: str, expected: str) -> InputError:
        return InputError(
            archive,
            found=found,
            expected=expected,
            do="Do not use this archive; report where it came from.",
        )

    try:
        with zipfile.ZipFile(archive) as z:
            for member in z.infolist():
                path = PurePosixPath(member.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in (path.parts or ("",))[0]:
                    raise refuse(f"a member called {member.filename!r}", "paths inside the archive")
            wanted = list(_wanted(source, z.infolist()))
            for member, _ in wanted:
                if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
                    raise refuse(f"{member.filename!r}, a link or device", "plain files")
            size, packed = (
                sum(m.file_size for m, _ in wanted),
                sum(m.compress_size for m, _ in wanted),
            )
            if size > MAX_UNPACKED or size > MAX_RATIO * max(packed, 1):
                raise refuse(
                    f"{size} bytes packed into {packed}",
                    f"at most {MAX_UNPACKED} bytes and {MAX_RATIO} to 1",
                )
            for member, file in track(wanted, description=f"unpack {source.name}", transient=True):
                (to / file).parent.mkdir(parents=True, exist_ok=True)
                with z.open(member) as packed_file, (to / file).open("wb") as out:
                    shutil.copyfileobj(
                        packed_file, out
                    )  # zipfile stops at the declared size and checks the CRC
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            archive,
            found=f"a damaged archive ({error})",
            expected="a zip archive",
            do="Delete it and fetch again.",
        ) from error


def _wanted(
    source: Source, members: Iterable[zipfile.ZipInfo]
) -> Iterable[tuple[zipfile.ZipInfo, Path]]:
    """Members that the layout names, each with its path below the dataset's folder."""
    patterns: dict[str, str] = {}
    for v in LAYOUTS[source.layout]:
        patterns |= {v.image_dir: v.image_pattern, v.label_dir: v.label_pattern}
    for member in members:
        path = PurePosixPath(member.filename)
        directory = path.parent.name
        if str(path.parent.parent) == source.archive_root and re.fullmatch(
            patterns.get(directory, r"(?!)"), path.name
        ):
            yield member, Path(directory) / path.name
