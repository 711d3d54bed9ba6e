"""Claims, what to run for them, and whether they come out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from emadapt.cli import main
from emadapt.config import load_study
from emadapt.errors import ConfigError, EmadaptError, InputError
from emadapt.replicate import chosen, compare, describe, kept_table, read_claims, report, steps

ROOT = Path(__file__).parents[1]
CHECK = {"list": "units", "where": {"regime": "lora", "test_set": "a"}, "value": "iou.mean", "is": 0.8, "within": 0.02}


def summary(mean: float = 0.81) -> dict[str, Any]:
    ci95 = [mean - 0.05, mean + 0.05]
    return {"study": "demo", "units": [
        {"regime": "lora", "test_set": "a", "iou": {"mean": mean, "ci95": ci95}},
        {"regime": "frozen", "test_set": "a", "iou": {"mean": 0.1, "ci95": [0.0, 0.2]}}]}  # fmt: skip


def claims(path: Path, **change: Any) -> Any:
    claim = {"says": "It holds.", "study": "demo", "needs": "cpu", "hours": 0.5, "checks": [CHECK]} | change
    path.write_text(yaml.safe_dump({"mine": claim}))
    return read_claims(path)


def test_a_value_within_its_tolerance_or_bounds_holds(tmp_path: Path) -> None:
    own = claims(tmp_path / "c.yaml")["mine"]
    assert [right for right, _ in compare(own, summary())] == [True]
    assert [right for right, _ in compare(own, summary(0.83))] == [False]
    low = {k: v for k, v in CHECK.items() if k not in ("is", "within")} | {"value": "iou.ci95.0", "above": 0.0}
    bounds = claims(tmp_path / "c.yaml", checks=[low, low | {"above": 0.5, "below": 0.7}])["mine"]
    assert [right for right, _ in compare(bounds, summary(0.7))] == [True, True]
    assert [right for right, _ in compare(bounds, summary(0.5))] == [True, False]
    assert [right for right, _ in compare(bounds, summary(0.8))] == [True, False]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    own = claims(tmp_path / "c.yaml")["mine"]
    with pytest.raises(InputError, match=r"study 'other'.*emadapt use demo"):
        compare(own, summary() | {"study": "other"})
    several = claims(tmp_path / "c.yaml", checks=[CHECK | {"where": {"test_set": "a"}}])["mine"]
    with pytest.raises(InputError, match="found 2 entries"):
        compare(several, summary())
    with pytest.raises(ConfigError, match="expected list, where, value"):
        claims(tmp_path / "c.yaml", checks=[{"list": "units"}])
    with pytest.raises(ConfigError, match="needs"):
        claims(tmp_path / "c.yaml", needs="patience")
    with pytest.raises(EmadaptError, match="there are: mine"):
        chosen({"mine": own}, ["yours"])


def test_kept_reports_are_listed(tmp_path: Path) -> None:
    unit = {"backbone": "b", "train_set": "t", "n": 4, "peak_mb": 1500.0, "iou": {"values": [0.5, 0.6]}}
    units = [unit | {"regime": regime, "test_set": test, "seconds": seconds}
             for regime, seconds in (("frozen", 900.0), ("lora", 2700.0)) for test in ("a", "b")]  # fmt: skip
    folder = tmp_path / "reports/studies/mine"
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match=r"mine.*no summary.json"):
        kept_table(tmp_path)
    (folder / "summary.json").write_text(json.dumps({"units": units, "git": "0123456789-dirty"}))
    assert [cell.strip() for cell in kept_table(tmp_path)[2].split("|")[2:-1]] == ["2 x 2", "a 4, b 4", "2.0", "1.5", "0123456*"]


def test_the_table_of_kept_reports_in_the_results_is_what_the_command_prints() -> None:
    assert "\n".join(kept_table(ROOT)) in (ROOT / "docs/results.md").read_text()


def test_the_projects_own_claims_name_studies_and_results_that_are_there() -> None:
    own = read_claims(ROOT / "docs/claims.yaml")
    text = "\n".join(describe(own))
    for name, claim in own.items():
        study = load_study(ROOT / "studies" / f"{claim.study}.yaml")
        assert name in text
        assert all(step in text for step in steps(claim))
        public = {d for d in study.datasets if not d.startswith(("phantom", "dialled"))}
        assert bool(public) == bool(claim.fetch)
        for check in claim.checks:
            for key, values in (("regime", study.regimes), ("train_set", study.train_sets), ("test_set", study.datasets)):
                assert check["where"].get(key, values[0]) in values


def test_the_committed_report_holds_what_is_claimed_of_its_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a report that says something else does not."""
    monkeypatch.chdir(tmp_path)
    for name in ("docs/claims.yaml", "params.yaml", "reports/summary.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    result = CliRunner().invoke(main, ["replicate", "--compare"])
    assert result.exit_code == 0, result.output
    assert result.output.count("holds") >= 2
    found = json.loads(Path("reports/summary.json").read_text())
    for entry in found["units"]:
        entry["iou"]["mean"] = 0.0
    Path("reports/summary.json").write_text(json.dumps(found))
    result = CliRunner().invoke(main, ["replicate", "--compare"])
    assert result.exit_code == 1
    assert "DIFFERS" in result.output
    assert "emadapt use" in CliRunner().invoke(main, ["replicate"]).output


def test_the_kept_reports_of_other_studies_hold_what_is_claimed_of_them() -> None:
    own = read_claims(ROOT / "docs/claims.yaml")
    kept = {path.parent.name: json.loads(path.read_text()) for path in ROOT.glob("reports/studies/*/summary.json")}
    compared = [(name, compare(claim, kept[claim.study])) for name, claim in own.items() if claim.study in kept]
    assert compared
    for name, results in compared:
        assert all(right for right, _ in results), (name, results)


def test_running_keeps_settings_that_no_study_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("docs/claims.yaml", "params.yaml", "studies/demo.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    mine = Path("params.yaml").read_text() + "# mine\n"
    Path("params.yaml").write_text(mine)
    result = CliRunner().invoke(main, ["replicate", "--run"])
    assert result.exit_code == 2
    assert "cp params.yaml studies/mine.yaml" in result.output
    assert Path("params.yaml").read_text() == mine
    Path("params.yaml").write_text(Path("studies/demo.yaml").read_text())
    result = CliRunner().invoke(main, ["replicate", "--run"])
    assert result.exit_code == 2, "no data here: said before anything runs"
    assert "data" in result.output
    claims = yaml.safe_load(Path("docs/claims.yaml").read_text())
    later = {name: claim | {"study": "later", "needs": "cpu"} for name, claim in list(claims.items())[-1:]}
    Path("docs/claims.yaml").write_text(yaml.safe_dump({"first": next(iter(claims.values())) | {"study": "demo"}, **later}))
    shutil.copy("studies/demo.yaml", "studies/later.yaml")
    said = CliRunner().invoke(main, ["replicate", "--run"]).output
    assert all(f"study {name}: " in said for name in ("demo", "later")), "all are checked before the hours of the first"


def test_a_claim_that_cannot_be_compared_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/summary.json").write_text(json.dumps(summary()))
    absent = claims(tmp_path / "c.yaml", checks=[CHECK | {"value": "unseen.iou"}])["mine"]
    right = claims(tmp_path / "c.yaml")["mine"]
    assert report({"absent": absent, "right": right}) == 1
    said = capsys.readouterr().out
    assert "DIFFERS  absent" in said
    assert "holds  right" in said
