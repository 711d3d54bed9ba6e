"""The search space of a sweep: its dimensions by regime, and what a point of it means for a unit."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    distribution_to_json,
)

from emadapt.errors import InputError
from emadapt.study.study import (
    BackboneSettings,
    RegimeSettings,
    Study,
    Unit,
    digest,
    without_places,
)

Space = dict[str, BaseDistribution]
Params = dict[str, Any]

FROZEN_DECAY = (1e-4, 1e-1)
FULL_RATE = 0.1
"""Of the range of `adapter_lr`, where it is the rate of all weights."""


@dataclass(frozen=True)
class Target:
    """What is swept: one regime of one backbone on one training set."""

    backbone: str
    regime: str
    train_set: str


def check_target(study: Study, target: Target) -> None:
    """Everything about the target and its space that can be known before a trial runs.

    Raises:
        InputError: a name that the study does not have, or a choice in the space that the backbone or the heads do not know.
    """
    for what, name, have in (
        ("backbone", target.backbone, study.backbone_settings),
        ("regime", target.regime, study.regime_settings),
        ("train set", target.train_set, study.train_set_settings),
    ):
        if name not in have:
            raise InputError(
                f"{what} {name!r}",
                found="a name that params.yaml does not have",
                expected=", ".join(have),
                do="Correct the option, or add it to params.yaml.",
            )
    from emadapt.models.archs import get_arch, resolve_blocks
    from emadapt.models.heads import HEADS

    regime = study.regime_settings[target.regime]
    source = study.source_of(unit_of(study, target))
    fixed = regime.init_from and (
        regime.kind == "frozen"
        or not (source and study.regime_settings[source.regime].pretrained_tokens)
    )
    if regime.own_head or regime.init != "random" or fixed or regime.align:
        kind = f"kind `{regime.kind}`" if regime.own_head else f"`init: {regime.init}`"
        kind = (
            f"`init_from: {regime.init_from}`" if fixed else kind
        )  # whose rank and head are given
        kind = (
            f"`align: {regime.align}`" if regime.align else kind
        )  # stacked heads know no penalty, and no dataset
        raise InputError(
            f"regime {target.regime!r}",
            found=f"{kind}, which a sweep does not search",
            expected="a regime of a backbone with a head from random initial values, without `align`",
            do="Sweep another regime: ridge and kNN choose on validation slices by themselves.",
        )
    spec, arch = study.sweep, study.backbone_settings[target.backbone].arch
    width = get_arch(arch).dim
    if regime.low_rank and max(spec.rank) > width:
        raise InputError(
            "sweep.rank",
            found=str(max(spec.rank)),
            expected=f"at most {width}, the width of {arch}",
            do="Leave such ranks out.",
        )
    for blocks in spec.blocks:
        if blocks != "last":
            resolve_blocks(arch, blocks)
    if odd := [h for h in spec.head if h not in HEADS]:
        raise InputError(
            "sweep.head", found=odd[0], expected=", ".join(HEADS), do="Correct the list."
        )


def search_space(study: Study, target: Target) -> Space:
    """The dimensions of the target's regime, and those that the section `sweep:` adds."""
    from emadapt.models.heads import CONTROLS, HEADS, needs_image

    spec, regime = study.sweep, study.regime_settings[target.regime]
    frozen = regime.kind == "frozen"
    space: Space = {"head_lr": FloatDistribution(*spec.head_lr, log=True)}
    if regime.low_rank:
        space |= {
            "rank": CategoricalDistribution(spec.rank),
            "alpha_ratio": CategoricalDistribution(spec.alpha_ratio),
            "dropout": FloatDistribution(*spec.dropout),
        }
    if not frozen:
        low, high = spec.adapter_lr
        factor = FULL_RATE if regime.kind == "full" else 1.0
        space["adapter_lr"] = FloatDistribution(low * factor, high * factor, log=True)
    if decay := spec.weight_decay or (FROZEN_DECAY if frozen else ()):
        space["weight_decay"] = FloatDistribution(decay[0], decay[1], log=True)
    # One pass over the tokens fits several heads of the same kind; a control is no candidate.
    stackable = tuple(name for name in HEADS if not needs_image(name) and name not in CONTROLS)
    if heads := spec.head or (stackable if frozen else ()):
        space["head"] = CategoricalDistribution(heads)
    if spec.blocks:
        space["blocks"] = CategoricalDistribution([_text(b) for b in spec.blocks])
    if spec.scale:
        space["scale"] = CategoricalDistribution(spec.scale)
    return space


def default_point(study: Study, target: Target) -> Params:
    """Where params.yaml stands now: the first trial, so that the default is among them. Empty if it is not in the space."""
    unit = unit_of(study, target)
    train, regime, backbone = (
        study.train_settings(unit),
        study.regime_settings[target.regime],
        study.backbone_settings[target.backbone],
    )
    point: Params = {
        "head_lr": train.head_lr,
        "adapter_lr": train.adapter_lr,
        "weight_decay": train.weight_decay,
        "head": train.head,
        "rank": regime.rank,
        "alpha_ratio": regime.alpha / regime.rank,
        "dropout": regime.dropout,
        "blocks": _text(backbone.blocks),
        "scale": backbone.scale,
    }
    space = search_space(study, target)
    inside = all(_holds(choices, point[name]) for name, choices in space.items())
    return {name: point[name] for name in space} if inside else {}


def settings_at(
    study: Study, target: Target, params: Params
) -> tuple[BackboneSettings, RegimeSettings]:
    """The backbone and the regime that a point of the space stands for.

    Numbers are rounded to three digits, so that what `promote` writes into params.yaml is readable and yet trains the very
    same model.
    """
    backbone, regime = (
        study.backbone_settings[target.backbone],
        study.regime_settings[target.regime],
    )
    own = {
        k: _rounded(v)
        for k, v in params.items()
        if k in ("rank", "dropout", "head", "head_lr", "adapter_lr", "weight_decay")
    }
    if "alpha_ratio" in params:
        own["alpha"] = float(params["rank"] * params["alpha_ratio"])
    regime = dataclasses.replace(regime, **own)
    if "blocks" in params:
        text = params["blocks"]
        blocks = text if text in ("auto", "last") else tuple(int(b) for b in text.split("-"))
        backbone = dataclasses.replace(backbone, blocks=blocks)
    if "scale" in params:
        backbone = dataclasses.replace(backbone, scale=float(params["scale"]))
    return backbone, regime


def study_at(study: Study, target: Target, params: Params) -> tuple[Study, Unit]:
    """The study with the point's settings in place of the target's own, and the unit that a trial trains in it.

    It is trained with the study's first seed: a trial at the default is the study's own unit, to the last bit on a CPU.
    """
    backbone, regime = settings_at(study, target, params)
    changed = dataclasses.replace(
        study,
        backbone_settings={**study.backbone_settings, target.backbone: backbone},
        regime_settings={**study.regime_settings, target.regime: regime},
    )
    return changed, unit_of(study, target)


def definition(study: Study, target: Target) -> dict[str, Any]:
    """All that must be equal for two trials to belong to one sweep: the space, and every setting that it leaves alone."""
    space = search_space(study, target)
    anywhere = {
        name: _any(choices) for name, choices in space.items()
    }  # takes searched settings out of the comparison
    changed, unit = study_at(study, target, anywhere)
    said = {
        name: json.loads(distribution_to_json(choices))["attributes"]
        for name, choices in space.items()
    }
    return {"space": said, "fixed": without_places(changed.describe(unit))}


def definition_hash(study: Study, target: Target) -> str:
    """Eight hex digits for the study's name in the storage."""
    return digest(definition(study, target))[:8]


def unit_of(study: Study, target: Target) -> Unit:
    """The unit that trials train, by name."""
    return Unit(target.backbone, target.regime, target.train_set, study.seeds[0])


def _any(choices: BaseDistribution) -> Any:
    return choices.choices[0] if isinstance(choices, CategoricalDistribution) else choices.low  # type: ignore[attr-defined]


def _holds(choices: BaseDistribution, value: Any) -> bool:
    if isinstance(choices, CategoricalDistribution):
        return value in choices.choices
    return bool(choices.low <= value <= choices.high)  # type: ignore[attr-defined]


def _rounded(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _text(blocks: str | tuple[int, ...]) -> str:
    """Optuna keeps text, not tuples: (3, 6, 9, 12) -> "3-6-9-12"."""
    return blocks if isinstance(blocks, str) else "-".join(map(str, blocks))
