"""`emadapt sweep promote`: the winner becomes a regime of params.yaml, for `dvc repro` to train."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import optuna

from emadapt.errors import EmadaptError, InputError
from emadapt.study.backbones import BackboneSettings
from emadapt.study.regimes import RegimeSettings
from emadapt.study.strict import NAME
from emadapt.study.study import PARAMS, Study, load_study
from emadapt.sweep.space import LOW_RANK, Target, default_point, settings_at, settings_hash
from emadapt.sweep.storage import best_trial


def promote(sweep: optuna.Study, regime_name: str = "", path: Path = PARAMS) -> list[str]:
    """Write the best trial's settings into a study, its comments kept.

    Head, learning rates and weight decay belong to a regime. Blocks and scale belong to a backbone:
    where the sweep searched them, a variant of the backbone is written too.

    Args:
        sweep: it.
        regime_name: of the new regime; empty: the swept one's with `_tuned`.
        path: the study.

    Returns:
        What was done, a line each.

    Raises:
        InputError: no finished trial, a name that is taken, or settings or data that have changed
            since the sweep.
    """
    config, name = load_study(path), sweep.study_name
    best = best_trial(sweep.get_trials(deepcopy=False))
    if best is None:
        raise InputError(
            f"sweep {name}",
            found="no finished trial",
            expected="at least one",
            do="Let `emadapt sweep run` finish one.",
        )
    target = _target(sweep, config, path)
    backbone, regime = settings_at(config, target, best.params)
    default = default_point(config, target)
    if default and (backbone, regime) == settings_at(config, target, default):
        said = f"its own settings are the best of {name} (validation IoU {best.value:.4f})"
        return [f"{path}: unchanged; {said}"]
    regime_name = regime_name or f"{target.regime}_tuned"
    is_variant = backbone != config.backbone_settings[target.backbone]
    variant = f"{target.backbone}_{regime_name}" if is_variant else ""
    _check_new(path, "regime", regime_name, config.regime_settings)
    if variant:
        _check_new(path, "backbone", variant, config.backbone_settings)
    note = f"trial {best.number} of sweep {name}: validation IoU {best.value:.4f}"
    editor = ParamsEditor(path)
    editor.add("regimes", regime_name, own_values(regime), note)
    if variant:
        was = config.backbone_settings[target.backbone]
        values = {**editor.raw["backbones"][target.backbone], **changed_values(was, backbone)}
        editor.add("backbones", variant, values, note)
    editor.save()
    after = load_study(path)
    lines = [f"{path}: regime {regime_name!r} is {note}"]
    if variant:
        lines.append(
            f"{path}: backbone {variant!r} has the trial's blocks and scale; "
            f"the trial is {variant} with {regime_name}"
        )
    units = f"{len(after.units())} units now, {len(config.units())} before"
    return [*lines, f"study {after.name!r} has {units}. Next: dvc repro"]


def _target(sweep: optuna.Study, config: Study, path: Path) -> Target:
    """What was swept.

    Raises:
        InputError: the study no longer has it, or has other settings or data now.
    """
    target = Target(**sweep.user_attrs["target"])
    known = (
        target.backbone in config.backbone_settings
        and target.regime in config.regime_settings
        and target.train_set in config.train_set_settings
    )
    if not known or settings_hash(config, target) != sweep.study_name[-8:]:
        raise InputError(
            path,
            found=f"a study whose settings or data have changed since sweep {sweep.study_name}",
            expected="those that the sweep's trials were trained with",
            do="Put them back, or sweep again.",
        )
    return target


def _check_new(path: Path, what: str, name: str, have: dict[str, Any]) -> None:
    """Check a new name.

    Raises:
        InputError: it has other characters than a name may have, or is there already.
    """
    if not NAME.fullmatch(name):
        raise InputError(
            f"--as {name!r}",
            found="other characters",
            expected="letters, digits and _",
            do="Choose another.",
        )
    if name in have:
        raise InputError(
            f"{path}: {what} {name!r}",
            found="there already",
            expected="a new name",
            do="Give another one with --as, or delete it from the file.",
        )


def own_values(regime: RegimeSettings) -> dict[str, Any]:
    """What the file needs of a regime: kind, rank and alpha, and all that is not at its default."""
    shown = ("kind", "rank", "alpha") if regime.kind in LOW_RANK else ("kind",)
    return {
        field.name: getattr(regime, field.name)
        for field in dataclasses.fields(regime)
        if field.name in shown or getattr(regime, field.name) != field.default
    }


def changed_values(was: BackboneSettings, now: BackboneSettings) -> dict[str, Any]:
    """The settings of a backbone that are new, as YAML has them."""
    values = {field.name: getattr(now, field.name) for field in dataclasses.fields(now)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value != getattr(was, name)
    }


class ParamsEditor:
    """Changes a params.yaml in its own layout.

    Attributes:
        path: the file.
        raw: its content.
    """

    def __init__(self, path: Path) -> None:
        from ruamel.yaml import YAML
        from ruamel.yaml.util import load_yaml_guess_indent

        self.path, text = path, path.read_text()
        _, indent, offset = load_yaml_guess_indent(text)
        self._yaml = YAML()
        self._yaml.indent(mapping=2, sequence=indent or 2, offset=offset or 0)
        self._yaml.width, self._yaml.preserve_quotes = 4096, True
        self.raw: dict[str, Any] = self._yaml.load(text)

    def add(self, section: str, name: str, values: dict[str, Any], note: str) -> None:
        """Add an entry to a section and to the study, with a comment."""
        from ruamel.yaml.comments import CommentedMap

        entry = CommentedMap(values)
        entry.fa.set_flow_style()
        entries: Any = self.raw[section]
        entries[name] = entry
        entries.yaml_add_eol_comment(note, name)
        if name not in self.raw["study"][section]:
            self.raw["study"][section].append(name)

    def save(self) -> None:
        """Write the file: all of it, or nothing if it cannot be read as a study."""
        out = io.StringIO()
        self._yaml.dump(self.raw, out)
        temporary = self.path.with_name(f".{self.path.name}.part")
        try:
            temporary.write_text(out.getvalue())
            load_study(temporary)
            temporary.replace(self.path)
        except OSError as error:
            raise EmadaptError(
                f"{self.path}: cannot be written ({error}); give this user the right to"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
