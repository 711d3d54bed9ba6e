"""Settings of datasets, of training sets, and of the split into training, validation and test."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from emadapt.study.strict import Name, Settings, setting

LabelIds = Annotated[tuple[int, ...], Field(min_length=1)]
Threshold = Annotated[str, StringConstraints(pattern=r"^>\d+(\.\d+)?$")]
Nanometres = Annotated[float, Field(ge=0.5, lt=1e8)]  # as volumes/voxel.py has it
Share = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?%$")]
Count = Annotated[int, Field(ge=0)]
Sampling = Literal["balanced", "proportional"]
ONE_CLASS = ("foreground",)
"""Names of the classes of a dataset that has one, whatever that is called."""
INTERIOR_BOUNDARY = ("interior", "boundary")
"""Names of the classes that `boundaries` makes of one."""


class DatasetSettings(Settings):
    """An EM volume, or many medical ones."""

    task: Literal["segmentation", "classification"] = setting(
        "segmentation", "What its labels are: masks, or a class of each image.", "tokens"
    )
    layout: Literal["lucchi", "vnc", "folders", "stack", "volumes", "synthetic", "images"] = (
        setting(..., "How its files are laid out (see `data.layouts`).", "tokens")
    )
    voxel_nm: tuple[Nanometres, Nanometres, Nanometres] = setting(
        ...,
        "Voxel size (z, y, x) in nm; of layout `synthetic`, what domains are brought to.",
        "tokens",
    )
    foreground: Threshold | LabelIds = setting(
        ">127", 'Label values to segment: ">N" or a list of ids.', "tokens"
    )
    pairing: Literal["number", "stem", "lexicographic", "lexicographic_165"] = setting(
        "number",
        "How an image finds its label. The last two repeat a known mistake, for study `collapse`.",
        "tokens",
    )
    ignore: tuple[int, ...] = setting(
        (), "Label values of places that nobody knows: no loss and no score sees them.", "tokens"
    )
    path: str = setting("", "Folder of the raw data; empty: data/NAME.", "nothing")
    domains: int = setting(
        0,
        "Of layout `synthetic`: tissues, each with a stain and microscope of its own.",
        "tokens",
        ge=0,
    )
    seed: int = setting(
        0, "Of layout `synthetic`: another seed gives other domains.", "tokens", ge=0
    )
    classes: dict[Name, LabelIds] = setting(
        {},
        "Label ids of each class, e.g. `{mitochondria: [1], er: [2]}`, instead of `foreground`; "
        "one model segments all of them.",
        "tokens",
    )
    organelle: str = setting("", "The one of `classes` to segment, against the rest.", "tokens")
    boundaries: bool = setting(
        False,
        "Of labels that number objects: a model learns their interior and their boundary apart, so "
        "that objects which touch are found one by one.",
        "tokens",
    )
    labelled: bool = setting(
        True, "False: images alone. No model is trained on it or scored on it.", "tokens"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.organelle and self.organelle not in self.classes:
            raise ValueError(f"organelle must be one of {', '.join(self.classes) or '(none)'}")
        if self.classes and "foreground" in self.model_fields_set:
            raise ValueError("classes and foreground both say what to segment; leave one out")
        ids = self.rule if self.classes else ()
        if len(set(ids)) < len(ids):
            raise ValueError("a label id is in two classes; segment one of them with `organelle`")
        if (self.task == "classification") != (self.layout == "images"):
            raise ValueError("layout images is for task classification, and no other layout is")
        if self.synthetic != bool(self.domains):
            raise ValueError("layout synthetic needs `domains`, and no other layout has them")
        if self.boundaries and (len(self.rules) > 1 or self.ignore):
            raise ValueError("boundaries are of one class, without `ignore`")
        if not self.labelled and self.mispaired:
            raise ValueError("a dataset without labels has no pairs; leave out pairing")
        return self

    @property
    def synthetic(self) -> bool:
        """Whether a seed makes it: there are no files."""
        return self.layout == "synthetic"

    @property
    def of_volumes(self) -> bool:
        """Whether it is many volumes; each has grey values of its own and counts as one."""
        return self.layout == "volumes"

    @property
    def mispaired(self) -> bool:
        """Whether images get other slices' labels, as two lists sorted by name pair them."""
        return self.pairing.startswith("lexicographic")

    @property
    def rules(self) -> tuple[str | tuple[int, ...], ...]:
        """Label values of each class, as in `foreground`, in the order of `class_names`."""
        if self.organelle:
            return (self.classes[self.organelle],)
        return tuple(self.classes.values()) or (self.foreground,)

    @property
    def rule(self) -> str | tuple[int, ...]:
        """Label values of all classes together, as in `foreground`."""
        if not self.classes:
            return self.foreground
        return tuple(int(value) for ids in self.rules for value in ids)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of several classes; their ids in an ingested label are 1, 2, ... in this order."""
        if self.boundaries:
            return INTERIOR_BOUNDARY
        return tuple(self.classes) if len(self.rules) > 1 else ONE_CLASS


class ImagesSettings(DatasetSettings):
    """Whole images with a class each (`task: classification`), see `data.images`."""

    voxel_nm: tuple[Nanometres, Nanometres, Nanometres] = setting(
        (1.0, 1.0, 1.0), "Of no use: images have no scale.", "nothing"
    )
    side: int = setting(
        224, "Images are kept as squares of so many pixels; models see `tile`.", "tokens", ge=8
    )

    @model_validator(mode="after")
    def _own_fields(self) -> Self:
        own = {"task", "layout", "side", "path"}
        if odd := sorted(self.model_fields_set - own):
            raise ValueError(f"{', '.join(odd)}: not for task classification")
        return self


class TrainSetSettings(Settings):
    """What a unit trains on: one dataset or several, and how much of it is labelled."""

    datasets: tuple[str, ...] = setting(..., "Labelled datasets.", min_length=1)
    slices: Count | Share | dict[str, Count | Share] = setting(
        0,
        "Labelled training slices of each dataset, evenly spaced, chosen by the unit's seed: a "
        "number or a share (25%); 0: all. A map names them by dataset (`{vnc: 2}`); the others "
        "are labelled in full. In classification: images of each class, drawn by the seed. "
        "Of layout `volumes`: whole volumes.",
    )
    crops: Count | Share = setting(
        0, "Labelled tiles of each dataset (patches in 3D) instead of whole slices; 0: all."
    )
    sampling: Sampling | None = setting(None, "Instead of `train.sampling`.")
    unlabelled: tuple[str, ...] = setting(
        (), "Datasets whose images self-training sees; other regimes ignore them."
    )

    @field_validator("slices", "crops")
    @classmethod
    def _is_an_amount(cls, value: object) -> object:
        shares = value.values() if isinstance(value, dict) else [value]
        if any(isinstance(v, str) and not 0 < float(v.rstrip("%")) <= 100 for v in shares):
            raise ValueError("a share must lie above 0 % and be at most 100 %")
        if isinstance(value, dict) and 0 in value.values():
            raise ValueError("0 means all labels; leave that dataset out of the map")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        members = (*self.datasets, *self.unlabelled)
        if len(set(members)) < len(members):
            raise ValueError(f"a dataset is named twice in {list(members)}")
        if self.slices and self.crops:
            raise ValueError("give slices or crops, not both")
        if isinstance(self.slices, dict) and (odd := set(self.slices) - set(self.datasets)):
            raise ValueError(f"slices names {sorted(odd)}, not among its datasets")
        return self

    @property
    def few(self) -> bool:
        """Whether only a part of the training slices counts as labelled."""
        return bool(self.slices or self.crops)

    def slices_of(self, dataset: str) -> int | str:
        """Labelled training slices of one of its datasets: a number, a share, or 0 for all."""
        return self.slices.get(dataset, 0) if isinstance(self.slices, dict) else self.slices


class SplitSettings(Settings):
    """How slices become training, validation and test slices: blocks of z with a gap."""

    kind: Literal["blocks", "random"] = setting(
        "blocks", "`random` repeats the reference study, whose slices have test neighbours."
    )
    val: float = setting(0.15, "Share of the training slices for validation.", gt=0, lt=0.9)
    test: float = setting(
        0.2, "Share of the slices for testing, without an official test volume.", gt=0, lt=0.9
    )
    gap_nm: float = setting(
        30.0, "Thickness left out between blocks, at least a slice; 0: none is.", ge=0
    )
    seed: int = setting(0, "Seed of `random`.", ge=0)


SPLIT_PRESETS = {"paper": {"kind": "random", "val": 0.1, "test": 0.15, "gap_nm": 0.0}}
