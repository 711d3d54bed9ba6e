"""Weights files in any published naming, brought to timm's and checked to fit."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from emadapt.errors import InputError, first_line
from emadapt.models.archs import Arch, create_vit

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
DO = "Check that the file belongs to this architecture (`arch`)."


def check_file(path: Path) -> None:
    """Refuse what cannot be a weights file by its name.

    Raises:
        InputError: no such file, or another suffix.
    """
    if not path.is_file():
        raise InputError(
            path,
            found="a folder" if path.is_dir() else "no such file",
            expected="a weights file",
            do="Correct `file` of the backbone.",
        )
    if path.suffix not in SUFFIXES:
        raise InputError(
            path,
            found=f"suffix {path.suffix!r}",
            expected=".safetensors, .pt, .pth or .bin",
            do="Save the state dict as safetensors.",
        )


def read_state(path: Path, values: bool = True) -> dict[str, Any]:
    """State dict of a weights file, without running any code of it.

    Args:
        path: .safetensors, .pt, .pth or .bin.
        values: False for names and shapes alone, as tensors on the device "meta": quick, whatever
            the size of the file.

    Raises:
        InputError: no such file, or not a complete one of names and tensors.
    """
    check_file(path)
    try:
        content = _content(path, values)
    except Exception as error:  # the readers raise pickle, zip, safetensors, EOF and runtime errors
        raise InputError(
            path,
            found=f"content that cannot be read ({first_line(error)})",
            expected="a complete file of names and tensors, without code",
            do="Download it again, or save the state dict alone, best as safetensors.",
        ) from error
    # Training checkpoints wrap the state dict.
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values())
    if not content or not tensors:
        raise InputError(
            path,
            found=f"a {type(content).__name__} that is not a state dict",
            expected="a dict of names and tensors",
            do="Save the state dict alone, best as safetensors.",
        )
    return content


def _content(path: Path, values: bool) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path) if values else _safetensors_header(path)
    # Only zipped pickles can be mapped; torch < 1.6 wrote others, which are read whole.
    zipped = zipfile.is_zipfile(path)
    if zipped and _is_packed(path):
        raise ValueError("compressed parts, which torch.save does not write")
    device, mapped = ("cpu", False) if values else ("meta", zipped)
    return torch.load(path, map_location=device, weights_only=True, mmap=mapped)


def _is_packed(path: Path) -> bool:
    """Whether parts of a zip file are compressed: small files could unpack to any size."""
    with zipfile.ZipFile(path) as file:
        return any(info.compress_type != zipfile.ZIP_STORED for info in file.infolist())


def _safetensors_header(path: Path) -> dict[str, Tensor]:
    # safe_open checks that the file is as long as its header says.
    with safe_open(path, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def to_timm(state: dict[str, Tensor], arch: Arch, what: str | Path) -> dict[str, Tensor]:
    """Rename to timm's naming, and check that all tensors are there and no others.

    Meta's DINO checkpoints and OpenCLIP's are renamed by timm's own converters, Hugging Face's
    first to Meta's naming.

    Args:
        state: names and tensors; on the device "meta" where only the fit matters.
        arch: the architecture that they must be of.
        what: file or package to name in an error.

    Returns:
        State dict for `emadapt.models.archs.create_vit`, in float32.

    Raises:
        InputError: tensors missing, left over or of another shape.
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
    from timm.models.eva import checkpoint_filter_fn as eva_filter  # timm takes a second
    from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter

    state = _from_hf_naming(state)
    if arch.family == "dinov3":
        state = _drop_zero_biases(state, what)
    with torch.device("meta"):
        template = create_vit(arch)
    expected = template.state_dict()
    # Without it timm does not resample a position embedding of another size without a word.
    template.pos_embed = None
    convert = eva_filter if arch.family == "dinov3" else vit_filter
    try:
        state = convert(dict(state), template)
    except Exception as error:  # whatever a converter meets in a file of another kind
        raise InputError(
            what,
            found=f"tensors that timm cannot convert ({type(error).__name__}: {first_line(error)})",
            expected=f"the weights of {arch.timm_name}",
            do=DO,
        ) from error
    if arch.family == "openclip":  # without the projection to the text space
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
    if found := misfit(state, expected):
        wanted = f"exactly the {len(expected)} tensors of {arch.timm_name}"
        raise InputError(what, found=found, expected=wanted, do=DO)
    return {k: state[k].detach().to(torch.float32).contiguous() for k in expected}


def misfit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What does not fit, by name and shape; empty if exactly the expected tensors are there."""
    found, wanted = ({k: tuple(v.shape) for k, v in own.items()} for own in (state, expected))
    odd = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    some = [f"{k} {found.get(k, 'missing')} instead of {wanted.get(k, 'none')}" for k in odd[:3]]
    return f"{len(odd)} tensors that do not fit ({', '.join(some)})" if odd else ""


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
    """Hugging Face's naming of DINOv2 and DINOv3 -> Meta's; other state dicts stay."""
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
            out[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(
                [q, torch.zeros_like(q) if k is None else k, v]
            )
    return out


def _drop_zero_biases(state: dict[str, Tensor], what: str | Path) -> dict[str, Tensor]:
    """Leave out DINOv3's qkv biases, which are zero as published and which timm does not have."""
    out = dict(state)
    for key in [k for k in state if k.endswith("attn.qkv.bias")]:
        q, _, v = out.pop(key).chunk(3)  # the key's third is masked out by the model
        if not q.is_meta and (q.any() or v.any()):
            raise InputError(
                what,
                found=f"a non-zero attention bias ({key})",
                expected="zero, as in the published DINOv3 models",
                do="Use the published weights, or timm's copy of them.",
            )
    return out


def onnx_encoder(content: bytes) -> dict[str, Tensor]:
    """Encoder of the saliency network in the naming of Hugging Face's Dinov2Model.

    Biases, norms and layer scales have kept their names. Linear weights are anonymous initialisers,
    found through the MatMul nodes that they feed; the position embedding is split in two constants
    that feed the first Concat and Reshape after the patch embedding.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(content).graph
    constants = {
        i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer
    }
    state = {
        k.removeprefix("backbone."): v for k, v in constants.items() if k.startswith("backbone.")
    }
    position: dict[str, Tensor] = {}
    for node in graph.node:
        held = [constants[name] for name in node.input if name in constants]
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/layer.") and held:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = held[0].T.contiguous()  # ONNX multiplies from the other side
        elif node.op_type in ("Concat", "Reshape") and node.name.startswith(
            "/backbone/embeddings/"
        ):
            for value in held:
                if value.ndim == 3:
                    position.setdefault(node.op_type, value)
    parts = [position["Concat"], position["Reshape"]]
    state["embeddings.position_embeddings"] = torch.cat(parts, dim=1)  # (1, 1370, D)
    return state
