"""What a third party must run for each claim of docs/results.md, and whether it comes out again.

Claims stand in docs/claims.yaml: a sentence, the study that shows it, what that needs, and values of reports/summary.json
with the tolerance within which another machine is to find them. Reports of studies on real data are kept in reports/studies.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emadapt.config import PARAMS
from emadapt.errors import ConfigError, EmadaptError, InputError
from emadapt.strict import read_yaml, specs_of

CLAIMS = Path("docs/claims.yaml")
SUMMARY = Path("reports/summary.json")
KEPT = Path("reports/studies")


@dataclass(frozen=True)
class Claim:
    """One sentence of docs/results.md that numbers stand for."""

    says: str
    study: str
    needs: Literal["cpu", "gpu"]
    hours: float
    """On two cores, or on one GPU, as it was measured; 0: not run yet."""
    fetch: tuple[str, ...] = ()
    """Public datasets to fetch first."""
    checks: tuple[dict[str, Any], ...] = ()
    """Each `list` of the summary, `where` (an entry's own values), `value` (dotted), and `is` with `within`, or bounds `above`,
    `below`."""


def read_claims(path: Path = CLAIMS) -> dict[str, Claim]:
    """Claims by name.

    Raises:
        ConfigError: the file is missing, or has something else in it.
    """
    problems: list[str] = []
    raw = read_yaml(path)
    checks = {name: tuple(claim.pop("checks", ())) for name, claim in raw.items() if isinstance(claim, dict)}
    claims: dict[str, Claim] = specs_of(Claim, raw, str(path), problems)
    for name, check in ((name, check) for name, some in checks.items() for check in some):
        if not {"list", "where", "value"} <= set(check) or not set(check) & {"is", "above", "below"}:
            problems.append(f"{path}: {name}: found check {check}; expected list, where, value, and is, above or below")
    if problems:
        raise ConfigError(problems)
    return {name: dataclasses.replace(claim, checks=checks[name]) for name, claim in claims.items()}


def steps(claim: Claim) -> list[str]:
    """Commands, in a clone of the project with its environment."""
    fetch = [f"emadapt fetch {' '.join(claim.fetch)} && dvc add data"] if claim.fetch else ["dvc pull data.dvc"]
    return [*fetch, f"emadapt use {claim.study} && emadapt check", "emadapt repro --jobs 2"]


def describe(claims: dict[str, Claim]) -> list[str]:
    """Lines for a person: per study what it claims, needs and how to run it."""
    lines = []
    for study in dict.fromkeys(claim.study for claim in claims.values()):
        own = {name: claim for name, claim in claims.items() if claim.study == study}
        first = next(iter(own.values()))
        machine = "two CPU cores" if first.needs == "cpu" else "a GPU machine that reaches the Hugging Face hub"
        lines += [f"study {study}: {machine}, {f'about {first.hours:g} h' if first.hours else 'not run yet'}"]
        lines += [f"  {name}: {' '.join(claim.says.split())}" for name, claim in own.items()]
        lines += [f"    $ {step}" for step in steps(first)]
    return lines


def kept_table(root: Path = Path(".")) -> list[str]:
    """Lines of Markdown: what was run for each kept report, for how long, and from which commit.

    Args:
        root: the project root.

    Raises:
        InputError: a kept report has no summary that can be read.
    """
    lines = ["| study | models x seeds | test slices | training of all, h | peak, GB | commit |", "|---|---:|---|---:|---:|---|"]
    for folder in sorted(path for path in (root / KEPT).iterdir() if path.is_dir()):
        try:
            summary = json.loads((folder / "summary.json").read_text())
        except (OSError, ValueError) as error:
            raise InputError(folder, found=f"no summary.json that can be read ({error})", expected="a report as `emadapt report`"
                             " writes it", do="Copy reports/summary.json of that study there.") from None  # fmt: skip
        units = summary["units"]
        models = {(u["backbone"], u["regime"], u["train_set"]): (u["seconds"], len(u["iou"]["values"])) for u in units}
        seeds = "/".join(str(n) for n in sorted({n for _, n in models.values()}))
        tests = [f"{name} {n}" for name, n in {u["test_set"]: u["n"] for u in units}.items()]
        tested = ", ".join(tests[:4]) + (f", {len(tests) - 4} more" if len(tests) > 4 else "")
        hours, peak = sum(seconds * n for seconds, n in models.values()) / 3600, max(u["peak_mb"] for u in units) / 1000
        commit, _, dirty = (summary["git"] or "not known").partition("-")
        cells = (f"[{folder.name}](../{KEPT}/{folder.name}/leaderboard.md)", f"{len(models)} x {seeds}", tested, f"{hours:.1f}",
                 f"{peak:.1f}", f"{commit[:7]}{'*' * bool(dirty)}")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def compare(claim: Claim, summary: dict[str, Any]) -> list[tuple[bool, str]]:
    """Whether each of the claim's values came out, and what was found.

    Raises:
        InputError: the summary is of another study, or lacks the entry.
    """
    if summary.get("study") != claim.study:
        raise InputError(SUMMARY, found=f"study {summary.get('study')!r}", expected=claim.study,
                         do=f"Run {'; '.join(steps(claim))}.")  # fmt: skip
    return [_compare(check, summary) for check in claim.checks]


def _compare(check: dict[str, Any], summary: dict[str, Any]) -> tuple[bool, str]:
    found = [e for e in summary.get(check["list"], []) if all(e.get(k) == v for k, v in check["where"].items())]
    what = f"{check['list']}, {', '.join(f'{k} {v}' for k, v in check['where'].items())}: {check['value']}"
    if len(found) != 1:
        raise InputError(SUMMARY, found=f"{len(found)} entries for {what}", expected="one", do="Rebuild the report.")
    value: Any = found[0]
    for key in check["value"].split("."):
        value = value[int(key)] if isinstance(value, list) else (value or {}).get(key)
    if value is None:
        raise InputError(SUMMARY, found=f"no value of {what}", expected="a number", do="Rebuild the report.")
    right, wanted = True, []
    if "is" in check:
        right &= abs(value - check["is"]) <= check.get("within", 0.0)
        wanted.append(f"{check['is']} within {check.get('within', 0.0)}")
    for bound, sign in (("above", 1), ("below", -1)):
        if bound in check:
            right &= sign * (value - check[bound]) > 0
            wanted.append(f"{bound} {check[bound]}")
    return bool(right), f"{what} is {value:.4f}; claimed: {', '.join(wanted)}"


def replicate(claims: dict[str, Claim], jobs: int) -> int:
    """Run the studies of the CPU claims one after the other, and compare. The last one stays selected.

    Returns:
        0 if all that was run came out as claimed, else 1.

    Raises:
        EmadaptError: params.yaml has settings of the user's own, or a study's settings or data have problems.
    """
    from emadapt.check import check_study, use_study
    from emadapt.repro import run_pipeline

    if PARAMS.is_file() and PARAMS.read_text() not in [p.read_text() for p in Path("studies").glob("*.yaml")]:
        raise InputError(PARAMS, found="settings that no file of studies/ holds", expected="a study, since this selects others",
                         do="Keep them: cp params.yaml studies/mine.yaml")  # fmt: skip
    wrong = 0
    studies = dict.fromkeys(claim.study for claim in claims.values())
    if problems := [f"study {study}: {line}" for study in studies for line in check_study(Path("studies") / f"{study}.yaml")]:
        raise ConfigError(problems)  # of all, before the hours of the first
    for study in studies:
        use_study(study)
        if run_pipeline(jobs, []):
            return 1
        wrong += report({name: claim for name, claim in claims.items() if claim.study == study})
    return int(wrong > 0)


def report(claims: dict[str, Claim]) -> int:
    """Print how the claims compare with reports/summary.json; the number that did not come out."""
    summary, wrong = json.loads(SUMMARY.read_text()), 0
    for name, claim in claims.items():
        try:
            results = compare(claim, summary)
        except InputError as error:  # the others are compared all the same
            results = [(False, str(error))]
        wrong += not all(right for right, _ in results)
        for right, text in results:
            print(f"{'holds' if right else 'DIFFERS'}  {name}: {text}")
    return wrong


def chosen(claims: dict[str, Claim], names: Sequence[str]) -> dict[str, Claim]:
    """Those of the names, all for none.

    Raises:
        EmadaptError: there is no claim of a name.
    """
    if unknown := [name for name in names if name not in claims]:
        raise EmadaptError(f"claim {unknown[0]!r} is not in {CLAIMS}; there are: {', '.join(claims)}")
    return {name: claims[name] for name in names} if names else claims
