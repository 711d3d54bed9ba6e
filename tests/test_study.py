"""Settings are read strictly, every mistake is named, and keys depend on what they should."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from emadapt.errors import ConfigError
from emadapt.study.keys import ORDER, affecting, digest
from emadapt.study.loading import load_study
from emadapt.study.strict import Settings
from emadapt.study.study import Study, Unit
from tiny import settings

ROOT = Path(__file__).parents[1]
STUDIES = sorted(ROOT.glob("studies/*/study.yaml"))

Change = Callable[[dict[str, Any]], object]


def problems(tmp_path: Path, params: dict[str, Any]) -> list[str]:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    try:
        load_study(path)
    except ConfigError as error:
        return error.problems
    return []


def loaded(tmp_path: Path, change: Change = lambda p: None) -> Study:
    params = settings()
    change(params)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return load_study(tmp_path / "params.yaml")


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.parent.name)
def test_every_shipped_study_loads_and_has_its_units(path):
    raw, study = yaml.safe_load(path.read_text())["study"], load_study(path)
    assert study.name == path.parent.name
    factors = ("backbones", "regimes", "train_sets", "seeds")
    count = math.prod(len(raw[factor]) for factor in factors)
    assert len({unit.name for unit in study.units()}) == count


def _section(name: str, **values: Any) -> Change:
    return lambda params: params[name].update(values)


def _entry(section: str, name: str, **values: Any) -> Change:
    return lambda params: params[section][name].update(values)


IMAGES = {"task": "classification", "layout": "images"}
OBJECTS: dict[str, Any] = {
    "layout": "stack",
    "voxel_nm": [9, 9, 9],
    "classes": {"a": [1], "b": [2]},
}
OBJECTS |= {"boundaries": True}
MISTAKES: list[tuple[Change, str]] = [
    (lambda p: p.update(trian={}), "unknown section 'trian'; did you mean 'train'?"),
    (lambda p: p.pop("regimes"), "section 'regimes' is missing"),
    (_section("train", epoch=3), "train: unknown key 'epoch'; did you mean 'epochs'?"),
    (_section("train", epochs="3"), "train.epochs: found '3'; expected a whole number"),
    (_section("train", augment=1), "train.augment: found 1; expected true or false"),
    (_section("train", head_lr=float("nan")), "train.head_lr: found nan"),
    (_section("study", seeds=[-1]), "study.seeds: found -1"),
    (_section("study", backbones=["x"]), "'x' is not in the map `backbones`"),
    (_section("study", datasets=["a", "a", "b"]), "a name is listed twice"),
    (_section("train_sets", a=["c"]), "'c' is not in study.datasets"),
    (_section("train_sets", a={"datasets": ["a"], "slices": "200%"}), "train_sets.a.slices"),
    (_section("datasets", **{"a.b": {}}), "letters, digits and underscores"),
    (_entry("datasets", "a", foreground="127"), "datasets.a.foreground: found '127'"),
    (
        _entry("datasets", "a", layout="zarr"),
        "expected 'lucchi', 'vnc', 'folders', 'stack', 'volumes', 'synthetic' or 'images'",
    ),
    (_entry("datasets", "a", voxel_nm=[30, 0, 5]), "datasets.a.voxel_nm"),
    (lambda p: p["datasets"]["a"].pop("voxel_nm"), "datasets.a: 'voxel_nm' is missing"),
    (_entry("datasets", "a", labelled=False), "'a' has no labels"),
    (_entry("datasets", "a", labelled=False, pairing="lexicographic"), "has no pairs"),
    (_section("datasets", a=OBJECTS), "boundaries are of one class"),
    (_section("datasets", a=IMAGES), "one task in a study"),
    (_section("datasets", a=IMAGES, b=IMAGES), "mean nothing to whole images"),
    (_entry("backbones", "t", source="file"), "source `file` needs `file`"),
    (_entry("backbones", "t", tile=0), "set views to 0"),
    (_entry("backbones", "t", align="histogram"), "needs a reference dataset"),
    (_entry("backbones", "t", align="histogram", reference="c"), "'c' is not in study.datasets"),
    (_entry("regimes", "lora", rank=0), "regimes.lora.rank: found 0"),
    (_entry("regimes", "lora", k=2), "regimes.lora: unknown key 'k'"),
    (_entry("regimes", "lora", kind="adapter"), "expected one of frozen, lora, lora_last_k"),
    (_section("regimes", r={"kind": "lora_last_k"}), "regimes.r: 'k' is missing"),
    (_section("regimes", r={"kind": "ridge", "head": "linear"}), "unknown key 'head'"),
    (_entry("regimes", "lora", warm_start="lora"), "it leads back to 'lora'"),
    (_entry("regimes", "lora", warm_start="x"), "expected REGIME or REGIME-TRAIN_SET"),
    (_entry("regimes", "frozen", self_training=1.0), "no training set of the study has `unl"),
    (lambda p: p.update(train="papers"), "unknown preset 'papers'; did you mean 'paper'?"),
    (lambda p: p.update(split={"val": 1.5}), "split.val: found 1.5"),
]


@pytest.mark.parametrize(("change", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_each_mistake_is_named(tmp_path, change, words):
    params = settings()
    change(params)
    found = problems(tmp_path, params)
    assert any(words in problem for problem in found), found


def test_all_mistakes_are_listed_at_once(tmp_path):
    params = settings()
    params["train"]["epoch"] = 1
    params["split"] = {"vall": 0.1}
    assert len(problems(tmp_path, params)) == 2


def test_a_regimes_settings_win_over_train(tmp_path):
    study = loaded(tmp_path, _entry("regimes", "lora", head="linear", epochs=7, weight_decay=0.0))
    frozen, lora = (study.train_settings(u) for u in study.units() if u.train_set == "a")
    assert (lora.head, lora.epochs, lora.weight_decay) == ("linear", 7, 0.0)
    assert lora.head_lr == frozen.head_lr
    assert (frozen.head, frozen.epochs) == ("pyramid", 2)


def test_whose_tokens_a_regime_works_on(tmp_path):
    def tokens_of(*regimes: str) -> list[str]:
        def change(params: dict[str, Any]) -> None:
            params["regimes"] |= {kind: {"kind": kind} for kind in ("ridge", "knn", "unet2d")}
            params["study"]["regimes"] = list(regimes)

        study = loaded(tmp_path, change)
        return [study.tokens_of(name) for name in regimes]

    shared = ["frozen", "frozen", "lora", "", "frozen"]
    assert tokens_of("ridge", "knn", "lora", "unet2d", "frozen") == shared
    assert tokens_of("unet2d", "knn", "ridge", "lora") == ["", "knn", "knn", "lora"]


def test_a_chain_of_warm_starts(tmp_path):
    def change(params: dict[str, Any]) -> None:
        params["regimes"]["lora"]["warm_start"] = "frozen-a"
        params["regimes"]["again"] = params["regimes"]["lora"] | {"warm_start": "lora"}

    study = loaded(tmp_path, change)
    first, second = Unit("t", "lora", "paired", 0), Unit("t", "frozen", "a", 0)
    assert study.sources_of(Unit("t", "again", "paired", 0)) == [first, second]
    assert study.sources_of(second) == []


@given(st.dictionaries(st.text(max_size=5), st.integers(), max_size=5))
def test_a_digest_does_not_depend_on_the_order_of_keys(value):
    assert digest(value) == digest(dict(reversed(value.items())))


def test_what_affects_a_result_grows_along_the_pipeline(tmp_path):
    study = loaded(tmp_path)
    models: list[Settings] = [
        study.backbone_settings["t"],
        study.regime_settings["lora"],
        study.train,
        study.dataset_settings["a"],
    ]
    for model in models:
        sets = [set(affecting(model, result)) for result in ORDER]
        assert all(earlier <= later for earlier, later in itertools.pairwise(sets))
        assert sets[-1] == set(type(model).model_fields)
    assert "workers" not in affecting(study.train, "weights")
    assert "file" not in affecting(study.backbone_settings["t"], "weights")
    assert "smooth_z_nm" not in affecting(study.backbone_settings["t"], "tokens")


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a", "frozen", "lora", ">1"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in nested maps and lists."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    if isinstance(value, list):
        inner = list(enumerate(value))
    below = [place for key, item in inner for place in places(item, (*above, key))]
    return [above] * bool(above) + below


@hypothesis_settings(max_examples=40)
@given(st.data())
def test_any_value_anywhere_is_read_or_refused_with_the_file_named(tmp_path_factory, data):
    params = settings()
    *above, last = data.draw(st.sampled_from(places(params)))
    place: Any = params
    for key in above:
        place = place[key]
    place[last] = data.draw(ANYTHING)
    folder = tmp_path_factory.mktemp("any")
    if found := problems(folder, params):
        assert all(problem.startswith(str(folder)) for problem in found)
        return
    study = load_study(folder / "params.yaml")
    for unit in study.units():
        assert json.loads(json.dumps(study.describe(unit))) == study.describe(unit)
        assert study.unit(unit.name) == unit
