import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from emadapt.errors import ConfigError
from emadapt.study.study import Unit, digest, load_study, not_default
from emadapt.sweep.space import Target, definition
from tiny import settings

STUDIES = Path(__file__).parents[1] / "studies"


def load(tmp_path: Path, params: object) -> list[str]:
    path = tmp_path / "params.yaml"
    path.write_text(params if isinstance(params, str) else yaml.safe_dump(params))
    try:
        load_study(path)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*/study.yaml")), ids=lambda p: p.parent.name)
def test_every_shipped_study_loads_and_has_its_units(path: Path) -> None:
    raw, study = yaml.safe_load(path.read_text()), load_study(path)
    lists = raw["study"]
    assert study.name == path.parent.name
    assert len({u.name for u in study.units()}) == len(lists["backbones"]) * len(
        lists["regimes"]
    ) * len(lists["train_sets"]) * len(lists["seeds"])


def test_params_yaml_is_a_shipped_study() -> None:
    params = STUDIES.parent / "params.yaml"
    study = load_study(params)
    assert params.read_text() == (STUDIES / study.name / "study.yaml").read_text()


def test_paper_presets_are_the_reference_protocol() -> None:
    study = load_study(STUDIES / "paper/study.yaml")
    train, split = study.train, study.split
    assert (train.head, train.loss, train.head_lr, train.adapter_lr, train.weight_decay) == (
        "deconv",
        "dice",
        5e-5,
        5e-5,
        1e-4,
    )
    assert (train.batch, train.epochs, train.patience, train.schedule, train.precision) == (
        1,
        1000,
        20,
        "constant",
        "fp32",
    )
    assert (split.kind, split.val, train.augment, train.balanced, train.monitor) == (
        "random",
        0.1,
        False,
        False,
        "val_loss",
    )
    for name in study.backbones:
        spec = study.backbone_settings[name]
        assert (spec.longest_edge, spec.tile, spec.blocks, spec.normalisation) == (
            1022,
            0,
            "last",
            "imagenet",
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.update(trian={}), "unknown section 'trian'"),
        (lambda p: p.pop("regimes"), "section 'regimes' is missing"),
        (lambda p: p["train"].update(epoch=3), "unknown key 'epoch'"),
        (lambda p: p["train"].update(epochs="3"), "expected a whole number"),
        (lambda p: p["train"].update(augment=1), "expected true or false"),
        (lambda p: p["train"].update(head_lr=float("nan")), "expected a finite number"),
        (lambda p: p["study"].update(seeds=[-1]), "study.seeds"),
        (lambda p: p["study"].update(backbones=["x"]), "'x' is not in the map `backbones`"),
        (lambda p: p["train_sets"].update(a=["c"]), "'c' is not in study.datasets"),
        (lambda p: p["datasets"].update({"a.b": {}}), "letters, digits and underscores"),
        (lambda p: p["datasets"]["a"].update(foreground="127"), "expected '>N'"),
        (lambda p: p["datasets"]["a"].update(layout="zarr"), "one of lucchi, vnc, folders, stack"),
        (lambda p: p["datasets"]["a"].pop("voxel_nm"), "'voxel_nm' is missing"),
        (lambda p: p["backbones"]["t"].update(source="file"), "needs `file`"),
        (lambda p: p["backbones"]["t"].update(tile=0), "set views to 0"),
        (lambda p: p["regimes"]["lora"].update(rank=0), "rank must be at least 1"),
        (
            lambda p: p["regimes"].update(r={"kind": "ridge", "head": "pyramid"}),
            "ridge has a head of its own",
        ),
        (
            lambda p: p["regimes"].update(r={"kind": "frozen", "init": "ridge"}),
            "add `head: linear`",
        ),
        (lambda p: p["regimes"].update(r={"kind": "unet2d", "init": "ridge"}), "regimes.r.init"),
        (
            lambda p: p["regimes"].update(
                r={"kind": "lora_last_k", "k": 2, "head": "linear", "init": "ridge"}
            ),
            "regimes.r.init: found ridge; its weights are of blocks",
        ),
        (
            lambda p: (
                p["study"].update(datasets=["a"], train_sets=["a"]),
                p["train_sets"].update(b=["b"]),
                p["regimes"]["lora"].update(init_from="frozen-b"),
            ),
            "regimes.lora.init_from: 'b', of its training set, is not in study.datasets",
        ),
        (
            lambda p: p["regimes"]["lora"].update(kind="lora_last_k"),
            "regimes.lora.k: found 0; expected a number of blocks",
        ),
        (lambda p: p["regimes"]["lora"].update(k=2), "regimes.lora.k: found 2"),
        (
            lambda p: p["regimes"]["lora"].update(kind="adapter"),
            "one of frozen, lora, lora_last_k, dora, bitfit, full, ridge, knn, unet2d",
        ),
        *(
            (
                lambda p, v=v: p["regimes"]["frozen"].update(kind="full", layer_decay=v),
                f"layer_decay: found {v}; expected a factor",
            )
            for v in (0.0, -0.5, 1.5)
        ),
        (lambda p: p["backbones"]["t"].update(stride=-7), "tile, views and stride at or above 0"),
        (lambda p: p.update(train="papers"), "unknown preset 'papers'"),
        (lambda p: p.update(split={"val": 1.5}), "val and test must lie"),
    ],
)
def test_each_mistake_is_named(tmp_path: Path, change, words: str) -> None:
    params = settings()
    change(params)
    problems = load(tmp_path, params)
    assert any(words in p for p in problems), problems


def test_all_mistakes_are_said_at_once_and_yaml_traps_are_refused(tmp_path: Path) -> None:
    params = settings()
    params["train"]["epoch"] = 1
    params["split"] = {"vall": 0.1}
    assert len(load(tmp_path, params)) == 2
    assert "not valid YAML" in load(tmp_path, "study: {a: 1, a: 2}")[0]  # a duplicate key
    assert "not valid YAML" in load(tmp_path, "study: !!python/object/apply:os.system [ls]")[0]
    assert "expected the sections" in load(tmp_path, "- 1")[0]


def test_regime_settings_win_over_train(tmp_path: Path) -> None:
    params = settings()
    params["regimes"]["lora"] |= {"head": "linear", "epochs": 7, "weight_decay": 0.0}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(params))
    study = load_study(tmp_path / "p.yaml")
    frozen, lora = (study.train_settings(u) for u in study.units() if u.train_set == "a")
    assert (lora.head, lora.epochs, lora.weight_decay, lora.head_lr) == (
        "linear",
        7,
        0.0,
        frozen.head_lr,
    )
    assert (frozen.head, frozen.epochs) == ("pyramid", 2)


def test_whose_tokens_a_regime_works_on(tmp_path: Path) -> None:
    params = settings()
    params["regimes"] |= {kind: {"kind": kind} for kind in ("ridge", "knn", "unet2d")}

    def tokens_of(*regimes: str) -> list[str]:
        params["study"]["regimes"] = list(regimes)
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(params))
        study = load_study(tmp_path / "p.yaml")
        return [study.tokens_of(name) for name in regimes]

    assert tokens_of("ridge", "knn", "lora", "unet2d", "frozen") == [
        "frozen",
        "frozen",
        "lora",
        "",
        "frozen",
    ]
    assert tokens_of("unet2d", "knn", "ridge", "lora") == [
        "",
        "knn",
        "knn",
        "lora",
    ]  # without a frozen one, the first


@given(st.dictionaries(st.text(max_size=5), st.integers(), max_size=5))
def test_digest_does_not_depend_on_the_order_of_keys(value: dict[str, int]) -> None:
    assert digest(value) == digest(dict(reversed(value.items())))


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
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [above] * bool(above) + [
        place for key, item in inner for place in places(item, (*above, key))
    ]


@hypothesis_settings(max_examples=25)
@given(st.data())
def test_whatever_stands_in_a_study_it_is_read_or_refused_as_settings_are(
    tmp_path_factory, data: st.DataObject
) -> None:
    params = settings()
    *above, last = data.draw(st.sampled_from(places(params)))
    place: Any = params
    for key in above:
        place = place[key]
    place[last] = data.draw(ANYTHING)
    folder = tmp_path_factory.mktemp("any")
    if problems := load(folder, params):
        assert all(problem.startswith(str(folder)) for problem in problems)
        return
    study = load_study(folder / "params.yaml")
    for unit in study.units():  # what is accepted can be written into a run, and compared
        assert json.loads(json.dumps(study.describe(unit))) == study.describe(unit)
        assert study.unit(unit.name) == unit


def test_where_files_lie_and_how_many_processes_load_change_no_weights(tmp_path: Path) -> None:
    keys, swept = [], []
    for n, change in enumerate(
        (
            lambda p: None,
            lambda p: p["train"].update(workers=2),
            lambda p: p["datasets"]["a"].update(path="elsewhere/a"),
            lambda p: p["backbones"]["t"].update(file="weights.safetensors"),
            lambda p: p["train"].update(head_lr=0.5),
        )
    ):
        params = settings()
        change(params)
        (file := tmp_path / f"{n}.yaml").write_text(yaml.safe_dump(params))
        study = load_study(file)
        keys.append(digest(not_default(study.describe(Unit("t", "frozen", "a", 0)))))
        swept.append(digest(definition(study, Target("t", "lora", "a"))))
    assert len(set(keys[:4])) == len(set(swept[:4])) == 1
    assert keys[4] != keys[0]
