"""A card for each model: what it is, what it was trained on and under which terms, how good it is, and where it will fail.

Sections follow Mitchell et al. 2019, Model Cards for Model Reporting (arXiv 1810.03993).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emadapt.data.sources import MANUAL, SOURCES, Manual, Source

KNOWN: dict[str, Source | Manual] = {**SOURCES, **MANUAL}


def model_card(card: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Markdown; the same bytes for the same model, so nothing of the commit, which stands on the unit's MLflow run.

    Args:
        card: model.json of the unit.
        metrics: its metrics.json.
    """
    trained_on = list(card["data_md5"])
    sections = [_what(card, metrics), _data(card, trained_on), _terms(trained_on), _scores(metrics, trained_on),
                _limits(card, metrics, trained_on), _provenance(card, metrics)]  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _what(card: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    weights = card["weights"]
    origin = "from random initial values" if weights["source"] == "none" else f"on {card['backbone']['arch']}"
    lines = [f"# {card['unit']}", "", f"Segments {_organelles(card)} in electron micrographs: regime `{card['regime']['kind']}`,"
             f" head `{card['head']}`, {origin}, {metrics['trainable_params']:,} trained parameters."]  # fmt: skip
    if weights["source"] != "none":
        lines.append(f"The backbone is not in the file; its weights are `{weights['name']}` from `{weights['source']}`, sha256"
                     f" `{weights['sha256']}`.")  # fmt: skip
    if (share := card["regime"].get("interpolate", -1.0)) >= 0:
        lines.append(f"Not trained: its weights lie {share:g} of the way from a frozen unit to one adapted from it (WiSE-FT).")
    if card["regime"].get("align") == "routed":
        sent = ", ".join(f"{name} to {test['routed_to']}" for name, test in metrics["test"].items())
        lines.append("Each training dataset has an adapter and a head of its own; a router, which sees tokens and no names, sent"
                     f" {sent}.")  # fmt: skip
    if weights["source"] == "random":
        lines.append("**Random weights: a control, not a model to use.**")
    return lines


def _organelles(card: Mapping[str, Any]) -> str:
    datasets = card.get("settings", {}).get("datasets", {}).values()
    return " and ".join(dict.fromkeys(d.get("organelle", "mitochondria").replace("_", " ") for d in datasets)) or "mitochondria"


def _data(card: Mapping[str, Any], trained_on: Sequence[str]) -> list[str]:
    slices, total = card["labelled"]["slices"]
    lines = ["## Training data", "", f"{slices} labelled slices of {total}.", "",
             "| dataset | voxel (z, y, x) nm | pairing | licence | citation |", "|---|---|---|---|---|"]  # fmt: skip
    for name in trained_on:
        source, voxel = KNOWN.get(name), ", ".join(f"{v:g}" for v in card["voxel_nm"][name])
        licence, citation = (source.licence, source.citation) if source else ("not known here: ask its owner", "")
        lines.append(f"| {name} | {voxel} | {card['pairing'][name]} | {licence} | {citation} |")
    if wrong := [name for name in trained_on if card["pairing"][name].startswith("lexicographic")]:
        lines += ["", f"**{', '.join(wrong)}: images with other slices' labels, to replicate a mistake. Not a model to use.**"]
    return lines


def _terms(trained_on: Sequence[str]) -> list[str]:
    unsettled = "emadapt is Apache-2.0. What terms of training data mean for an adapter is not settled; to be safe,"
    lines = ["## Terms", "", f"{unsettled} take them to hold for the adapter too:", ""]
    for name in trained_on:
        licence = KNOWN[name].licence if name in KNOWN else "not known here"
        use = " No commercial use." if "-NC" in licence or "research use" in licence else ""
        lines.append(f"- {name}: {licence}.{use}")
    return [*lines, "- the backbone's own licence holds for the backbone, which is not in the file."]


def _scores(metrics: Mapping[str, Any], trained_on: Sequence[str]) -> list[str]:
    how = "On test slices that training, early stopping and sweeps have not seen; pooled over the slices, 95 % interval from a"
    lines = ["## Scores", "", f"{how} bootstrap over blocks of slices; threshold 0.5; this one seed.", ""]
    lines += ["| tested on | | slices | foreground IoU | Dice | boundary IoU |", "|---|---|---:|---|---:|---:|"]
    for name, test in metrics["test"].items():
        (low, high), kind = test["iou_ci95"], "trained on it" if name in trained_on else "never seen"
        values = f"{test['iou']:.3f} ({low:.3f} to {high:.3f}) | {test['dice']:.3f} | {test['boundary_iou']:.3f}"
        lines.append(f"| {name} | {kind} | {test['n']} | {values} |")
    return lines


def _limits(card: Mapping[str, Any], metrics: Mapping[str, Any], trained_on: Sequence[str]) -> list[str]:
    voxels = " or ".join(f"{card['voxel_nm'][name][1]:g}" for name in trained_on)
    lines = [
        "## Limits", "", f"- Made for pixels of about {voxels} nm; resample other data to that first.",
        "- Slice by slice: no instances, no consistency along z beyond what `smooth_z_nm` averages.",
        "- Where a mitochondrion's edge lies is its labels' convention; another dataset's may be another.",
    ]  # fmt: skip
    unseen = {name: test["iou"] for name, test in metrics["test"].items() if name not in trained_on}
    if unseen:
        worst = min(unseen, key=lambda name: unseen[name])
        lines.append(f"- On data it has not seen expect less: {unseen[worst]:.2f} on {worst}. Label a few slices and fine-tune.")
    else:
        lines.append("- Not tested on any dataset that it was not trained on.")
    if few := [name for name, test in metrics["test"].items() if test["n"] < 10]:
        lines.append(f"- Fewer than ten test slices ({', '.join(few)}) say little.")
    return lines


def _provenance(card: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    rows = {
        "unit key": card["key"], "study": card["study"], "data md5": ", ".join(f"{k} {v}" for k, v in card["data_md5"].items()),
        "model md5": metrics["model_md5"], "validation IoU": f"{metrics['val_iou']:.4f}",
        "training": f"{metrics['train_seconds']:,.0f} s, peak {metrics['peak_mb']:,.0f} MB, {card['precision']}",
        "emadapt": card["version"],
    }  # fmt: skip
    return ["## Provenance", "", *(f"- {name}: {value}" for name, value in rows.items())]
