"""`emadapt sweep promote`: the winner becomes a regime of params.yaml, for `dvc repro` to train."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import optuna

from emadapt.errors import EmadaptError, InputError
from emadapt.files import whole_file
from emadapt.study.loading import PARAMS, load_study
from emadapt.study.regimes import RegimeSettings
from emadapt.study.strict import NAME
from emadapt.sweep.space import default_point, regime_at, target_of
from emadapt.sweep.storage import best_trial, first_number


def promote(sweep: optuna.Study, regime_name: str) -> list[str]:
    """Write the best trial's settings into params.yaml, its comments kept.

    Args:
        sweep: it.
        regime_name: of the new regime; empty: the swept one's with `_tuned`.

    Returns:
        What was done, a line each.

    Raises:
        InputError: no finished trial, a name that is taken, or settings or data that have changed
            since the sweep.
    """
    config, name = load_study(), sweep.study_name
    best = best_trial(sweep.get_trials(deepcopy=False))
    if best is None:
        raise InputError(
            f"sweep {name}",
            found="no finished trial",
            expected="at least one",
            do="Let `emadapt sweep run` finish one.",
        )
    target = target_of(sweep, config)
    regime, default = regime_at(config, target, best.params), default_point(config, target)
    if default and regime == regime_at(config, target, default):
        said = f"its own settings are the best of {name} (validation score {best.value:.4f})"
        return [f"{PARAMS}: unchanged; {said}"]
    regime_name = regime_name or f"{target.regime}_tuned"
    if not NAME.fullmatch(regime_name) or regime_name in config.regime_settings:
        raise InputError(
            f"regime {regime_name!r}",
            found="there already" if regime_name in config.regime_settings else "other characters",
            expected="a new name of letters, digits and _",
            do="Choose another with --as, or delete the regime from params.yaml.",
        )
    note = f"trial {first_number(best)} of sweep {name}: validation score {best.value:.4f}"
    write_regime(PARAMS, regime_name, own_values(regime), note)
    after = load_study()
    units = f"{len(after.units())} units now, {len(config.units())} before"
    return [
        f"{PARAMS}: regime {regime_name!r} is {note}",
        f"study {after.name!r} has {units}. Next: emadapt repro",
    ]


def own_values(regime: RegimeSettings) -> dict[str, Any]:
    """What the file needs of a regime: kind, rank and alpha, and all that is not at its default."""
    values = regime.model_dump(mode="json")
    shown = {name: values[name] for name in ("kind", "rank", "alpha") if name in values}
    return shown | regime.model_dump(mode="json", exclude_defaults=True)


def write_regime(path: Path, name: str, values: dict[str, Any], note: str) -> None:
    """Add a regime to a params.yaml and to its study, with a comment, in the file's own layout.

    The file is written as a whole, and only if it can be read as a study.

    Raises:
        EmadaptError: it cannot be written.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap
    from ruamel.yaml.util import load_yaml_guess_indent

    text = path.read_text()
    _, indent, offset = load_yaml_guess_indent(text)
    round_trip = YAML()
    round_trip.indent(mapping=2, sequence=indent or 2, offset=offset or 0)
    round_trip.width, round_trip.preserve_quotes = 4096, True
    params = round_trip.load(text)
    entry = CommentedMap(values)
    entry.fa.set_flow_style()
    params["regimes"][name] = entry
    params["regimes"].yaml_add_eol_comment(note, name)
    params["study"]["regimes"].append(name)
    out = io.StringIO()
    round_trip.dump(params, out)
    try:
        with whole_file(path) as temporary:
            temporary.write_text(out.getvalue())
            load_study(temporary)
    except OSError as error:
        raise EmadaptError(
            f"{path}: cannot be written ({error}); give this user the right to"
        ) from error
