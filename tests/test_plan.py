"""The stage `plan`: which changes make other plans, and which do not."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tifffile
import yaml

from emadapt.data.ingest import ingest
from emadapt.errors import InputError
from emadapt.models.identity import file_sha256
from emadapt.study.loading import load_study
from emadapt.study.study import Study
from emadapt.training.plan import PLAN, check_planned, train_plan, unit_key, write_plans
from emadapt.training.train import train_unit
from tiny import make_study, settings

Edit = Callable[[dict[str, Any]], Any]


def params() -> dict[str, Any]:
    """Two backbones, one aligned to dataset b; three regimes with a backbone, one without."""
    own = settings()
    own["backbones"]["h"] = own["backbones"]["t"] | {"align": "histogram", "reference": "b"}
    own["regimes"] |= {
        "warm": {"kind": "lora", "rank": 2, "alpha": 4, "warm_start": "frozen"},
        "unet2d": {"kind": "unet2d"},
    }
    own["study"] |= {"backbones": ["t", "h"], "regimes": ["frozen", "lora", "warm", "unet2d"]}
    return own


@pytest.fixture
def study(tmp_path, tracking_off):
    return make_study(tmp_path, params())


def plans() -> dict[str, str]:
    write_plans(load_study())
    files = PLAN.glob("*/*.json")
    return {f.relative_to(PLAN).with_suffix("").as_posix(): f.read_text() for f in files}


def changed(edit: Edit) -> set[str]:
    """Plans that are others, or new, after an edit of params.yaml."""
    before = plans()
    own = yaml.safe_load(Path("params.yaml").read_text())
    edit(own)
    Path("params.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    after = plans()
    return {name for name in after if after[name] != before.get(name)}


def units(kind: str, *, backbone: str = "th", regimes: str, train_set: str = "") -> set[str]:
    """Names of plans of a kind, e.g. train/t-lora-a-0."""
    train_sets = [train_set] if train_set else ["a", "paired"]
    pairs = [(b, r) for b in backbone for r in regimes.split()]
    return {f"{kind}/{b}-{r}-{t}-0" for b, r in pairs for t in train_sets}


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            lambda own: own["regimes"]["lora"].update(rank=3),
            units("train", regimes="lora") | {"diagnose/t-lora", "diagnose/h-lora"},
        ),
        (
            lambda own: own["regimes"]["frozen"].update(head_lr=0.1),
            units("train", regimes="frozen warm") | {"diagnose/t-warm", "diagnose/h-warm"},
        ),
        (lambda own: own["train"].update(workers=2), set()),
        (
            lambda own: own["diagnose"].update(replicates=3),
            {f"diagnose/{b}-{r}" for b in "th" for r in ("frozen", "lora", "warm")},
        ),
        (lambda own: own["study"].update(regimes=["frozen"]), set()),
    ],
    ids=["rank", "learning-rate", "workers", "replicates", "fewer-regimes"],
)
def test_a_setting_changes_its_own_plans(study, edit, expected):
    assert changed(edit) == expected


def test_what_a_study_no_longer_has_leaves_no_plan_and_waits_until_it_is_back(study):
    plans()
    results = ("build/evaluate/t-lora-a-0/own", "reports/domain/t-lora.json", "build/ingest/b/own")
    for path in (*results, "build/units/t-lora-a-0/own"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("made by hand")
    before = Path("params.yaml").read_text()

    def without_lora_and_b(own: dict[str, Any]) -> None:
        own["backbones"] = {"t": own["backbones"]["t"]}
        own["study"] |= {"regimes": ["frozen"], "backbones": ["t"]}
        own["study"] |= {"datasets": ["a"], "train_sets": ["a"]}

    changed(without_lora_and_b)
    assert {path.stem for path in PLAN.glob("diagnose/*")} == {"t-frozen"}
    assert not any(Path(path).exists() for path in results)
    assert Path("build/units/t-lora-a-0").exists()
    Path("params.yaml").write_text(before)
    plans()
    assert {Path(path).read_text() for path in results} == {"made by hand"}


def test_data_changes_the_plans_of_its_members_and_of_what_it_is_a_reference_for(study):
    before = plans()
    path = Path("data/b/image.tif")
    tifffile.imwrite(path, 255 - tifffile.imread(path), photometric="minisblack")
    ingest(study, "b")
    after = plans()
    same = {name for name in before if before[name] == after[name]}
    untouched = units("train", backbone="t", regimes="frozen lora warm unet2d", train_set="a")
    assert same == untouched | {"tokens/t-a", "diagnose/t-unet2d", "diagnose/h-unet2d"}


def test_what_changes_no_byte_trains_nothing_again(study):
    """A label rule that means the same; a voxel size, which scores and model cards have."""
    before, keys = plans(), {unit: unit_key(study, unit) for unit in study.units()}
    own = yaml.safe_load(Path("params.yaml").read_text())
    own["datasets"]["b"] |= {"foreground": ">0"}
    Path("params.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    ingest(load_study(), "b")
    assert plans() == before
    own["datasets"]["b"]["voxel_nm"] = [50, 6, 6]
    Path("params.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    ingest(load_study(), "b")
    after = plans()
    every = "frozen lora warm unet2d"
    assert {name for name in after if after[name] != before[name]} == (
        units("train", regimes=every, train_set="paired") | units("evaluate", regimes=every)
    )
    assert {unit: unit_key(load_study(), unit) for unit in study.units()} == keys


def test_a_second_run_writes_the_same(study):
    assert plans() == plans() != {}


def test_a_replaced_weights_file_is_noticed(study):
    Path("weights.bin").write_bytes(b"one")
    own = {"arch": "dinov2_s", "source": "file", "file": "weights.bin"}
    changed(lambda p: p["backbones"].update(t=p["backbones"]["t"] | own))
    before = plans()
    Path("weights.bin").write_bytes(b"two")
    after = plans()
    assert {n for n in before if before[n] != after[n] and "/h-" not in n} == (
        {"tokens/t-a", "tokens/t-b", "diagnose/t-frozen", "diagnose/t-lora", "diagnose/t-warm"}
        | units("train", backbone="t", regimes="frozen lora warm")
    )
    Path("weights.bin").unlink()
    with pytest.raises(InputError, match=r"weights\.bin: found no file that can be read"):
        plans()


@pytest.mark.parametrize("kind", ["mitonet", "sam2"])
def test_replaced_weights_of_a_published_system_are_noticed(study: Study, kind: str) -> None:
    weights = Path("models/theirs" if kind == "sam2" else "models/theirs.pth")
    file = weights / "model.safetensors" if kind == "sam2" else weights
    file.parent.mkdir(parents=True)
    file.write_bytes(b"one")
    regime = {"kind": kind, "weights": str(weights)}
    changed(lambda own: own["regimes"].update(unet2d=regime))
    before = plans()
    file.write_bytes(b"two!")
    after = plans()
    assert {n for n in after if after[n] != before[n]} == units("train", regimes="unet2d")


def test_a_model_folder_that_a_unit_starts_from_is_noticed(study):
    Path("models/mine").mkdir(parents=True)
    Path("models/mine/model.safetensors").write_bytes(b"one")
    changed(lambda own: own["regimes"]["warm"].update(warm_start="models/mine"))
    unit = next(unit for unit in load_study().units() if unit.regime == "warm")
    before = unit_key(load_study(), unit)
    Path("models/mine/model.safetensors").write_bytes(b"two!")
    assert unit_key(load_study(), unit) != before


def test_hashes_are_remembered_by_all_who_ask_at_once(tracking_off):
    files = [Path(f"file{n}") for n in range(40)]
    for file in files:
        file.write_text(file.name)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(file_sha256, files))
    assert sorted(json.loads(Path("scratch/hashes.json").read_text()).values()) == sorted(found)
    assert found == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_settings_edited_while_the_pipeline_runs_are_refused(study, monkeypatch):
    """DVC would record a model of these settings as one of those before."""
    write_plans(study)
    every = [unit for unit in study.units() if unit.backbone == "t"]
    for unit in every:
        monkeypatch.setenv("DVC_STAGE", f"train@{unit.name}")
        check_planned("train", unit.name, partial(train_plan, study, unit))
    path = Path("params.yaml")
    path.write_text(path.read_text().replace("epochs: 2", "epochs: 3"))
    with pytest.raises(InputError, match=r"other settings.*`emadapt repro` again"):
        train_unit(load_study(), every[-1])
    assert not Path("build/units").exists()


def test_without_ingested_data_it_says_what_to_run(tmp_path, tracking_off):
    study = make_study(tmp_path, ingested=False)
    with pytest.raises(InputError, match="Run `emadapt ingest a`"):
        write_plans(study)
