"""Which weights the settings name, found without loading them and without torch.

A file is named by its sha256, a repository of the hub by its revision: weights that are replaced
under the same name get another identity, and all that was made with the old ones is made again.
"""

from __future__ import annotations

from pathlib import Path

from emadapt.errors import InputError
from emadapt.files import remembered_sha256
from emadapt.models.archs import PYPI_RELEASE, arch_of
from emadapt.models.hub import hub_file
from emadapt.study.backbones import BackboneSettings
from emadapt.study.regimes import PretrainedSystemSettings


def backbone_weights(spec: BackboneSettings) -> dict[str, str]:
    """The identity of a backbone's weights.

    Raises:
        InputError: there can be no such weights, the file is missing, or the hub cannot be reached.
    """
    arch = arch_of(spec)
    if spec.source == "file":
        return {"sha256": file_sha256(Path(spec.file))}
    if spec.source == "pypi":
        return {"release": PYPI_RELEASE}
    if spec.source == "random":
        return {"random": spec.arch}
    return _revision(arch.hub, arch.files, spec.revision)


def system_weights(regime: PretrainedSystemSettings) -> dict[str, str]:
    """The identity of the weights of a pretrained system: a file, a folder or a repository.

    Raises:
        InputError: the hub cannot be reached.
    """
    path = Path(regime.weights)
    if path.is_dir():
        return model_folder(path)
    if path.is_file():
        return {"sha256": file_sha256(path)}
    return _revision(regime.weights, ("model.safetensors",))


def model_folder(folder: Path) -> dict[str, str]:
    """Sha256 of the files of a model in a folder, by name."""
    files = sorted(p for p in folder.glob("*") if p.suffix in (".json", ".safetensors"))
    return {path.name: file_sha256(path) for path in files}


def _revision(repository: str, files: tuple[str, ...], revision: str = "") -> dict[str, str]:
    """`REPOSITORY@REVISION` of what the local cache has; what it lacks is downloaded."""
    return {"revision": f"{repository}@{hub_file(repository, files, revision).parent.name}"}


def file_sha256(path: Path) -> str:
    """Sha256 of a file, from memory while it has not changed.

    Raises:
        InputError: it is missing or cannot be read.
    """
    try:
        return remembered_sha256([path])[path]
    except OSError as error:
        raise InputError(
            path,
            found=f"no file that can be read ({error.strerror})",
            expected="the weights that the settings name",
            do="Correct the path in params.yaml, or put the file there.",
        ) from error
