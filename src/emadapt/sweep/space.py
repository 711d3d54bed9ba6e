"""The search space of a sweep: its dimensions by regime, and what a point means for a unit."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, distribution_to_json
from optuna.trial import Trial

from emadapt.errors import InputError
from emadapt.study.keys import digest
from emadapt.study.regimes import LowRankSettings, RegimeSettings
from emadapt.study.study import Study, Unit
from emadapt.training.plan import unit_plan

Space = dict[str, CategoricalDistribution | FloatDistribution]
Params = dict[str, Any]

SWEPT = ("frozen", "lora", "lora_last_k", "bitfit", "full")
"""Kinds of regimes with something to search."""
FROZEN_DECAY = (1e-4, 1e-1)
"""Range of the weight decay of a frozen regime, if the settings give none."""
FULL_RATE = 0.1
"""Of the range of `adapter_lr`, where it is the rate of all weights."""


@dataclass(frozen=True)
class Target:
    """What is swept: one regime of one backbone on one training set."""

    backbone: str
    regime: str
    train_set: str


def target_of(sweep: optuna.Study, study: Study) -> Target:
    """What a sweep sweeps, as `begin` noted it there.

    Raises:
        InputError: the study has other settings or data than the sweep's trials.
    """
    target = Target(**sweep.user_attrs["target"])
    known = (
        target.backbone in study.backbone_settings
        and target.regime in study.regime_settings
        and target.train_set in study.train_set_settings
    )
    if not known or settings_hash(study, target) != sweep.study_name[-8:]:
        raise InputError(
            f"study {study.name}",
            found=f"one whose settings or data have changed since sweep {sweep.study_name}",
            expected="those that the sweep's trials were trained with",
            do="Put them back, or sweep again.",
        )
    return target


def check_target(study: Study, target: Target) -> None:
    """Refuse a target before a trial runs.

    Raises:
        InputError: a name that the study does not have, a regime with nothing to search, or a
            rank above the width of the backbone.
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
    regime = study.regime_settings[target.regime]
    if why := _nothing_to_search(study, target):
        raise InputError(
            f"regime {target.regime!r}",
            found=f"{why}, which a sweep does not search",
            expected=f"a regime of kind {', '.join(SWEPT)} whose head starts from random values",
            do="Sweep another; a probe, ridge and kNN choose on validation data by themselves.",
        )
    from emadapt.models.archs import get_arch

    ranges, arch = study.sweep, study.backbone_settings[target.backbone].arch
    width = get_arch(arch).dim
    if isinstance(regime, LowRankSettings) and max(ranges.rank) > width:
        raise InputError(
            "sweep.rank",
            found=str(max(ranges.rank)),
            expected=f"at most {width}, the width of {arch}",
            do="Leave such ranks out.",
        )


def _nothing_to_search(study: Study, target: Target) -> str:
    """Why the target's regime cannot be swept; empty if it can."""
    regime = study.regime_settings[target.regime]
    if regime.kind not in SWEPT:
        return f"kind `{regime.kind}`"
    if study.classifies and regime.kind == "frozen":
        return "a linear probe, which has no learning rate"
    if getattr(regime, "self_training", 0):
        return "`self_training`"
    if start := study.warm_start_of(unit_of(study, target)):
        # The rank is given by the model it starts from, unless that is a head alone.
        source = study.source_of(unit_of(study, target))
        from_head = source and study.regime_settings[source.regime].kind == "frozen"
        if regime.kind == "frozen" or not from_head:
            return f"`warm_start: {start}`"
    return ""


def search_space(study: Study, target: Target) -> Space:
    """The dimensions of the target's regime, and those that the section `sweep:` adds."""
    ranges, regime = study.sweep, study.regime_settings[target.regime]
    frozen = regime.kind == "frozen"
    space: Space = {"head_lr": FloatDistribution(*ranges.head_lr, log=True)}
    if isinstance(regime, LowRankSettings):
        space["rank"] = CategoricalDistribution(ranges.rank)
        space["alpha_ratio"] = CategoricalDistribution(ranges.alpha_ratio)
        space["dropout"] = FloatDistribution(*ranges.dropout)
    if not frozen:
        low, high = ranges.adapter_lr
        factor = FULL_RATE if regime.kind == "full" else 1.0
        space["adapter_lr"] = FloatDistribution(low * factor, high * factor, log=True)
    if decay := ranges.weight_decay or (FROZEN_DECAY if frozen else ()):
        space["weight_decay"] = FloatDistribution(decay[0], decay[1], log=True)
    given = study.classifies or study.warm_start_of(unit_of(study, target))
    if ranges.head and not given:
        space["head"] = CategoricalDistribution(ranges.head)
    return space


def suggest(trial: Trial, space: Space) -> Params:
    """A point of the space, as Optuna chooses it for a trial."""
    for name, choices in space.items():
        if isinstance(choices, CategoricalDistribution):
            trial.suggest_categorical(name, choices.choices)
        else:
            trial.suggest_float(name, choices.low, choices.high, log=choices.log)
    return trial.params


def default_point(study: Study, target: Target) -> Params:
    """What params.yaml says now: the first trial. Empty if it is not in the space."""
    unit = unit_of(study, target)
    train, regime = study.train_settings(unit), study.regime_settings[target.regime]
    space = search_space(study, target)
    point: Params = {
        "head_lr": train.head_lr,
        "adapter_lr": train.adapter_lr,
        "weight_decay": train.weight_decay,
        "head": train.head,
    }
    if isinstance(regime, LowRankSettings):
        point["rank"] = regime.rank
        point["alpha_ratio"] = regime.alpha / regime.rank
        point["dropout"] = regime.dropout
    inside = all(_holds(choices, point[name]) for name, choices in space.items())
    return {name: point[name] for name in space} if inside else {}


def regime_at(study: Study, target: Target, params: Params) -> RegimeSettings:
    """The regime that a point of the space stands for.

    Numbers are rounded to three digits, so that what `promote` writes into params.yaml is readable
    and yet trains the very same model.
    """
    own = {
        name: float(f"{value:.3g}") if isinstance(value, float) else value
        for name, value in params.items()
    }
    if "alpha_ratio" in own:
        own["alpha"] = float(own["rank"] * own.pop("alpha_ratio"))
    return study.regime_settings[target.regime].changed(**own)


def study_at(study: Study, target: Target, params: Params) -> tuple[Study, Unit]:
    """The study with the point's settings in place of the target's own, and the unit to train.

    The unit has the study's first seed: a trial at the default is the study's own unit, to the
    last bit on a CPU.
    """
    regimes = {**study.regime_settings, target.regime: regime_at(study, target, params)}
    return dataclasses.replace(study, regime_settings=regimes), unit_of(study, target)


def described(space: Space) -> dict[str, Any]:
    """The space as JSON values."""
    said = {name: json.loads(distribution_to_json(choices)) for name, choices in space.items()}
    return {name: own["attributes"] for name, own in said.items()}


def settings_hash(study: Study, target: Target) -> str:
    """Eight digits of all that the trials of a sweep share: space, other settings, data, weights.

    Raises:
        InputError: a dataset is not ingested, or weights are missing.
    """
    space = search_space(study, target)
    # Searched settings at one value, whatever params.yaml says of them now.
    anywhere = {
        name: choices.choices[0] if isinstance(choices, CategoricalDistribution) else choices.low
        for name, choices in space.items()
    }
    plan = unit_plan(*study_at(study, target, anywhere))
    return digest({"space": described(space), "plan": plan})[:8]


def unit_of(study: Study, target: Target) -> Unit:
    """The unit that trials train, by name."""
    return Unit(target.backbone, target.regime, target.train_set, study.seeds[0])


def _holds(choices: CategoricalDistribution | FloatDistribution, value: Any) -> bool:
    if isinstance(choices, CategoricalDistribution):
        return value in choices.choices
    return choices.low <= value <= choices.high
