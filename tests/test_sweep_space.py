from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution

from emadapt.errors import ConfigError, InputError
from emadapt.study.study import Study, load_study
from emadapt.study.sweep import SweepSettings
from emadapt.sweep.promote import _write
from emadapt.sweep.space import (
    Target,
    check_target,
    default_point,
    definition_hash,
    search_space,
    settings_at,
    study_at,
)
from tiny import settings

LORA, FROZEN = Target("t", "lora", "a"), Target("t", "frozen", "a")
MORE = {
    "weight_decay": [1e-4, 0.1],
    "head": ["linear", "pyramid"],
    "blocks": ["auto", "last", [1, 3]],
    "scale": [1.0, 1.5],
}


def study(tmp_path: Path, sweep: dict[str, Any] | None = None, **changes: Any) -> Study:
    params = settings() | ({"sweep": sweep} if sweep is not None else {})
    for section, values in changes.items():
        params[section] = {**params[section], **values}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return load_study(tmp_path / "params.yaml")


def test_the_regime_decides_what_is_searched_and_params_yaml_adds_to_it(tmp_path: Path) -> None:
    plain, more = study(tmp_path), study(tmp_path, MORE)
    lora = {"rank", "alpha_ratio", "dropout", "head_lr", "adapter_lr"}
    assert set(search_space(plain, LORA)) == lora
    assert set(search_space(more, LORA)) == lora | {"weight_decay", "head", "blocks", "scale"}
    assert set(search_space(plain, FROZEN)) == {"head_lr", "weight_decay", "head"}
    assert set(search_space(more, FROZEN)) == {"head_lr", "weight_decay", "head", "blocks", "scale"}
    assert search_space(more, FROZEN)["head"].choices == ("linear", "pyramid")  # type: ignore[attr-defined]
    assert search_space(plain, FROZEN)["head"].choices == ("linear", "deconv", "pyramid")  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["lora_last_k", "dora", "bitfit", "full"])
def test_the_other_regimes_search_what_they_have(tmp_path: Path, kind: str) -> None:
    target = Target("t", "new", "a")
    spec = {"kind": kind, "rank": 4, "alpha": 4, **({"k": 2} if kind == "lora_last_k" else {})}
    here = study(tmp_path, regimes={"new": spec})
    rates, factors = {"head_lr", "adapter_lr"}, {"rank", "alpha_ratio", "dropout"}
    assert set(search_space(here, target)) == rates | (
        factors if kind in ("lora_last_k", "dora") else set()
    )
    changed, _ = study_at(here, target, default_point(here, target))
    assert default_point(here, target)
    assert changed.regime_settings["new"].k == here.regime_settings["new"].k
    check_target(here, target)
    if kind in ("lora_last_k", "dora"):
        with pytest.raises(InputError, match=r"sweep.rank: found 65; expected at most 64"):
            check_target(study(tmp_path, {"rank": [65]}, regimes={"new": spec}), target)


@pytest.mark.parametrize("target", [LORA, FROZEN], ids=lambda t: t.regime)
def test_a_sweeps_definition_is_the_space_and_what_it_leaves_alone(
    tmp_path: Path, target: Target
) -> None:
    """Searched settings may change in params.yaml, as promoting changes them; anything else makes another sweep."""
    here = definition_hash(study(tmp_path), target)
    searched = {
        "head_lr": 0.007,
        **({"rank": 8, "alpha": 3.0, "dropout": 0.2} if target is LORA else {"head": "linear"}),
    }
    assert (
        definition_hash(
            study(tmp_path, regimes={target.regime: {"kind": target.regime, **searched}}), target
        )
        == here
    )
    assert (
        definition_hash(
            study(tmp_path, {"sampler": "gp", "pruner": "none", "seed": 7, "stack": 2}), target
        )
        == here
    )
    others = [
        study(tmp_path, train={"epochs": 7}),
        study(tmp_path, {"head_lr": [1e-4, 2e-2]}),
        study(tmp_path, MORE),
        study(tmp_path, train_sets={"a": ["b"]}),
        study(tmp_path, study={"seeds": [1]}),
    ]
    assert here not in {definition_hash(s, target) for s in others}


def test_nothing_of_the_sweep_section_enters_a_unit(tmp_path: Path) -> None:
    plain, more = study(tmp_path), study(tmp_path, {**MORE, "seed": 3})
    assert [plain.describe(u) for u in plain.units()] == [more.describe(u) for u in more.units()]


@pytest.mark.parametrize("target", [LORA, FROZEN], ids=lambda t: t.regime)
def test_the_default_point_is_the_study_itself(tmp_path: Path, target: Target) -> None:
    here = study(tmp_path, MORE)
    changed, unit = study_at(here, target, default_point(here, target))
    assert unit in here.units()
    assert changed.backbone_settings == here.backbone_settings
    assert changed.train_settings(unit) == here.train_settings(unit)
    mine, its = here.regime_settings[target.regime], changed.regime_settings[target.regime]
    assert (its.kind, its.rank, its.alpha, its.dropout) == (
        mine.kind,
        mine.rank,
        mine.alpha,
        mine.dropout,
    )


def test_a_default_outside_the_space_is_no_trial(tmp_path: Path) -> None:
    assert default_point(study(tmp_path, {"rank": [4, 8]}), LORA) == {}


def points(target: Target) -> st.SearchStrategy[dict[str, Any]]:
    """Any point of the full space."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        space = search_space(study(Path(folder), MORE), target)

    def values(choices: BaseDistribution) -> st.SearchStrategy[Any]:
        if isinstance(choices, CategoricalDistribution):
            return st.sampled_from(choices.choices)
        return st.floats(choices.low, choices.high)  # type: ignore[attr-defined]

    return st.fixed_dictionaries({name: values(choices) for name, choices in space.items()})


@pytest.mark.parametrize("target", [LORA, FROZEN], ids=lambda t: t.regime)
def test_what_is_written_into_params_yaml_is_read_as_the_trials_own_settings(
    tmp_path: Path, target: Target
) -> None:
    from emadapt.sweep.promote import _changed, _own_values

    path = tmp_path / "params.yaml"

    @hypothesis_settings(
        max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(points(target))
    def check(point: dict[str, Any]) -> None:
        here = study(tmp_path, MORE)
        backbone, regime = settings_at(here, target, point)
        changed = _changed(here, target, backbone)
        _write(
            path,
            "tuned",
            _own_values(regime),
            target.backbone,
            "t_tuned" if changed else "",
            changed,
            "why",
        )
        there = load_study(path)
        assert there.regime_settings["tuned"] == regime
        assert there.backbone_settings["t_tuned" if changed else "t"] == backbone

    check()


@pytest.mark.parametrize(
    ("target", "sweep", "words"),
    [
        (Target("x", "lora", "a"), {}, r"backbone 'x'.*expected t\."),
        (Target("t", "x", "a"), {}, "regime 'x'.*expected frozen, lora"),
        (Target("t", "lora", "x"), {}, "train set 'x'.*expected a, paired"),
        (LORA, {"rank": [8, 4096]}, "sweep.rank: found 4096; expected at most"),
        (LORA, {"head": ["fpn"]}, "sweep.head: found fpn"),
        (LORA, {"blocks": [[1, 99]]}, "99"),
    ],
)
def test_a_target_that_cannot_be_swept_is_refused(
    tmp_path: Path, target: Target, sweep: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        check_target(study(tmp_path, sweep), target)


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"sampler": "grid"}, "one of tpe, gp"),
        ({"pruner": "mean"}, "one of median, hyperband, none"),
        ({"head_lr": [1e-2, 1e-4]}, "sweep.head_lr"),
        ({"weight_decay": [0.0, 0.1]}, "sweep.weight_decay"),
        ({"weight_decay": [0.1]}, "sweep.weight_decay"),
        ({"dropout": [0.0, 1.0]}, "sweep.dropout"),
        ({"rank": [4, 4]}, "a choice stands twice"),
        ({"rank": [0, 4]}, "ranks must be at least 1"),
        ({"blocks": ["first"]}, "sweep.blocks: found 'first'"),
        ({"stack": 0}, "stack must be at least 1"),
        ({"ranks": [4]}, "unknown key 'ranks'"),
    ],
)
def test_each_mistake_in_the_section_is_named(
    tmp_path: Path, sweep: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        study(tmp_path, sweep)
    assert any(words in p for p in caught.value.problems), caught.value.problems


def test_defaults_are_in_order() -> None:
    assert SweepSettings().problems() == []


@pytest.mark.parametrize(
    ("regime", "words"),
    [
        ({"kind": "ridge"}, "kind `ridge`"),
        ({"kind": "knn"}, "kind `knn`"),
        ({"kind": "unet2d"}, "kind `unet2d`"),
        ({"kind": "frozen", "head": "linear", "init": "ridge"}, "`init: ridge`"),
        ({"kind": "frozen", "init_from": "frozen"}, "`init_from: frozen`"),
        ({"kind": "lora", "rank": 2, "alpha": 4, "init_from": "lora"}, "`init_from: lora`"),
        ({"kind": "lora", "init_from": "models/mine"}, "`init_from: models/mine`"),
    ],
)
def test_a_regime_with_nothing_to_search_is_refused(
    tmp_path: Path, regime: dict[str, Any], words: str
) -> None:
    with pytest.raises(
        InputError,
        match=rf"regime 'own': found {words}, which a sweep does not search.*Sweep another regime",
    ):
        check_target(study(tmp_path, regimes={"own": regime}), Target("t", "own", "a"))


def test_linear_probing_then_fine_tuning_is_swept_and_full_has_rates_of_its_own(
    tmp_path: Path,
) -> None:
    own = study(
        tmp_path, regimes={"lpft": {"kind": "lora", "init_from": "frozen"}, "all": {"kind": "full"}}
    )
    check_target(own, Target("t", "lpft", "a"))
    low, high = own.sweep.adapter_lr
    found = search_space(own, Target("t", "all", "a"))["adapter_lr"]
    assert (found.low, found.high) == pytest.approx((low / 10, high / 10))  # type: ignore[attr-defined]
    assert "rank" in search_space(own, Target("t", "lpft", "a"))
