"""`emadapt sweep promote`: the winner becomes a regime of params.yaml, which `dvc repro` then trains over the study's seeds."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import optuna

from emadapt.errors import EmadaptError, InputError
from emadapt.study.study import NAME, PARAMS, BackboneSettings, RegimeSettings, Study, load_study
from emadapt.sweep.logbook import best_trial
from emadapt.sweep.space import Target, default_point, definition, settings_at
from emadapt.sweep.storage import Store, difference, find_sweep


def promote(store: Store, name: str, regime_name: str = "", path: Path = PARAMS) -> list[str]:
    """Write the best trial's settings into a study, its comments kept.

    Head, learning rates and weight decay belong to a regime. Blocks and scale belong to a backbone: where the sweep
    searched them, a variant of the backbone is written too.

    Args:
        store: where the sweep is.
        name: of the sweep.
        regime_name: of the new regime; empty: the swept one's with `_tuned`.
        path: the study.

    Returns:
        What was done, a line each.

    Raises:
        InputError: no finished trial, a name that is taken, or settings that have changed since the sweep.
    """
    config = load_study(path)
    study = optuna.load_study(study_name=find_sweep(store, name), storage=store.storage)
    best = best_trial(study.get_trials(deepcopy=False))
    if best is None:
        raise InputError(
            f"sweep {name!r}",
            found="no finished trial",
            expected="at least one",
            do="Let `emadapt sweep run` finish one.",
        )
    target = _target(study, config, path)
    default = default_point(config, target)
    if default and settings_at(config, target, best.params) == settings_at(config, target, default):
        return [
            f"{path}: unchanged; its own settings are the best of {study.study_name} (validation IoU {best.value:.4f})"
        ]
    regime_name = regime_name or f"{target.regime}_tuned"
    backbone, regime = settings_at(config, target, best.params)
    variant = (
        ""
        if backbone == config.backbone_settings[target.backbone]
        else f"{target.backbone}_{regime_name}"
    )
    for what, new, have in (
        ("regime", regime_name, config.regime_settings),
        ("backbone", variant, config.backbone_settings),
    ):
        if new and not NAME.fullmatch(new):
            raise InputError(
                f"--as {new!r}",
                found="other characters",
                expected="letters, digits and _",
                do="Choose another.",
            )
        if new in have:
            raise InputError(
                f"{path}: {what} {new!r}",
                found="there already",
                expected="a new name",
                do="Give another one with --as, or delete it from the file.",
            )
    note = f"trial {best.number} of sweep {study.study_name}: validation IoU {best.value:.4f}"
    _write(
        path,
        regime_name,
        _own_values(regime),
        target.backbone,
        variant,
        _changed(config, target, backbone),
        note,
    )
    after = load_study(path)
    lines = [f"{path}: regime {regime_name!r} is {note}"]
    if variant:
        lines.append(
            f"{path}: backbone {variant!r} has the trial's blocks and scale; the trial is {variant} with {regime_name}"
        )
    lines.append(
        f"study {after.name!r} has {len(after.units())} units now, {len(config.units())} before. Next: dvc repro"
    )
    return lines


def _target(study: optuna.Study, config: Study, path: Path) -> Target:
    """What was swept.

    Raises:
        InputError: the study no longer has it, or has other settings now.
    """
    was = study.user_attrs["definition"]
    unit = was["fixed"]["unit"]
    target = Target(unit["backbone"], unit["regime"], unit["train_set"])
    known = (
        target.backbone in config.backbone_settings
        and target.regime in config.regime_settings
        and target.train_set in config.train_set_settings
    )
    now = definition(config, target) if known else {}
    if now.get("fixed") != was["fixed"]:
        raise InputError(
            path,
            found=f"a study with {difference({'fixed': was['fixed']}, {'fixed': now.get('fixed', {})})}",
            expected="the settings that the sweep's trials were trained with",
            do="Put them back.",
        )
    return target


def _own_values(regime: RegimeSettings) -> dict[str, Any]:
    """What the file needs of a regime: its kind, the rank and alpha of low-rank ones, and all that is not at its default."""
    shown = ("kind", "rank", "alpha") if regime.low_rank else ("kind",)
    return {
        f.name: getattr(regime, f.name)
        for f in dataclasses.fields(regime)
        if f.name in shown or getattr(regime, f.name) != f.default
    }


def _changed(config: Study, target: Target, backbone: BackboneSettings) -> dict[str, Any]:
    was = config.backbone_settings[target.backbone]
    values = {f.name: getattr(backbone, f.name) for f in dataclasses.fields(backbone)}
    return {
        k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v != getattr(was, k)
    }


def _write(
    path: Path,
    regime_name: str,
    regime: dict[str, Any],
    backbone: str,
    variant: str,
    changed: dict[str, Any],
    note: str,
) -> None:
    """Add the regime, and the backbone's variant if there is one, in the file's own layout; all or nothing."""
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap
    from ruamel.yaml.util import load_yaml_guess_indent

    editor = YAML()
    text = path.read_text()
    _, indent, offset = load_yaml_guess_indent(text)
    editor.indent(mapping=2, sequence=indent or 2, offset=offset or 0)
    editor.width, editor.preserve_quotes = 4096, True
    raw = editor.load(text)

    def add(section: str, name: str, values: dict[str, Any]) -> None:
        entry = CommentedMap(values)
        entry.fa.set_flow_style()
        raw[section][name] = entry
        raw[section].yaml_add_eol_comment(note, name)
        if name not in raw["study"][section]:
            raw["study"][section].append(name)

    add("regimes", regime_name, regime)
    if variant:
        add("backbones", variant, {**raw["backbones"][backbone], **changed})
    out = io.StringIO()
    editor.dump(raw, out)
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(out.getvalue())
        load_study(temporary)  # what is written must be readable
        temporary.replace(path)
    except OSError as error:
        raise EmadaptError(
            f"{path}: cannot be written ({error}); give this user the right to"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
