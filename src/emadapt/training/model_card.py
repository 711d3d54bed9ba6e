"""A card for each model: what it is, its data and terms, its scores, and its limits.

Sections follow Mitchell et al. 2019, Model Cards for Model Reporting (arXiv 1810.03993).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emadapt.data.ingest import INGESTED, open_volume
from emadapt.files import file_md5
from emadapt.metrics.classification import SCORES
from emadapt.models.archs import BACKBONES
from emadapt.study.study import CLASSIFIERS

EVALUATED = Path("build/evaluate")
FAMILIES = {
    "dinov2": (
        "Apache-2.0",
        "Oquab et al. 2023, DINOv2: Learning robust visual features without supervision",
        "2304.07193",
    ),
    "dinov3": ("the DINOv3 License", "Siméoni et al. 2025, DINOv3", "2508.10104"),
    "openclip": (
        "MIT",
        "Cherti et al. 2022, Reproducible scaling laws for contrastive language-image learning",
        "2212.07143",
    ),
}
"""Licence and paper (words, arXiv number) of a family of backbones."""
SYSTEMS = {"mitonet": "MitoNet (Conrad & Narayan 2023)", "sam2": "SAM 2 (Ravi et al. 2024)"}
"""What a regime is that uses a published system."""
IMAGE_LIMITS = [
    "## Limits",
    "",
    "- Not a medical device. It knows its classes alone, as its training data show them.",
    "- Images of other sources, devices or patients may look different; test it on yours first.",
]
NEVER, EARLIER = "never seen", "through the model that it starts from"


@dataclass(frozen=True)
class Behind:
    """A dataset that has gone into a model.

    Attributes:
        name: in the study.
        role: how it got there; empty of what the model itself was trained on.
        source: what its SOURCE.json says; empty without one.
    """

    name: str
    role: str
    source: Mapping[str, Any]

    @property
    def licence(self) -> str:
        return str(self.source.get("licence", "not known here"))

    @property
    def named(self) -> str:
        return f"{self.name} ({self.role})" if self.role else self.name


def model_card(
    card: Mapping[str, Any], metrics: Mapping[str, Any] | None, with_backbone: bool = False
) -> str:
    """A model card in Markdown. The same model gives the same bytes.

    Args:
        card: model.json of the unit.
        metrics: its metrics.json; None where it was not evaluated.
        with_backbone: whether the file that the card goes with holds the backbone, too.
    """
    sections = [_what(card, with_backbone), _data(card), _terms(card, with_backbone)]
    classifies = _classifies(card)
    if metrics:
        sections.append((_image_scores if classifies else _scores)(card, metrics))
    sections += [IMAGE_LIMITS if classifies else _limits(card, metrics), _provenance(card, metrics)]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def card_of(folder: Path, card: Mapping[str, Any], with_backbone: bool = False) -> str:
    """The card of a model in a folder, with its scores if it was evaluated."""
    return model_card(card, metrics_of(folder, card), with_backbone)


def metrics_of(folder: Path, card: Mapping[str, Any]) -> dict[str, Any] | None:
    """Scores of the model in a folder; None if this very model was not evaluated."""
    for path in (folder / "metrics.json", EVALUATED / str(card["unit"]) / "metrics.json"):
        if path.is_file():
            metrics = dict(json.loads(path.read_text()))
            if metrics["model_md5"] == file_md5(folder / "model.safetensors"):
                return metrics
    return None


def datasets_behind(card: Mapping[str, Any]) -> list[Behind]:
    """All datasets that went into a model, or into a model that it started from."""
    found = [(name, "") for name in card.get("data_md5", {})]
    found += [(name, "its images, without labels") for name in card.get("unlabelled_md5", {})]
    found += [(name, EARLIER) for name in _names(card.get("settings", {}).get("source"))]
    sources = dict(card.get("sources", {}))
    for before in card.get("started_from", []):  # models in folders
        sources.setdefault(before["name"], before["source"])
        found.append((before["name"], EARLIER))
    roles: dict[str, str] = {}
    for name, role in found:
        roles.setdefault(name, role)
    return [Behind(name, role, sources.get(name, {})) for name, role in roles.items()]


def terms_of(card: Mapping[str, Any], with_backbone: bool = False) -> list[str]:
    """A line for each dataset behind a model, and for its backbone."""
    lines = []
    for data in datasets_behind(card):
        commercial = "-NC" not in data.licence and "research use" not in data.licence
        use = "" if commercial else " No commercial use."
        lines.append(f"{data.named}: {data.licence}.{use}")
    if system := _system(card):
        lines.append(f"{system}: its weights' licence, also for what is trained from them.")
    elif family := family_of(card):
        own = "the backbone's own licence holds for the backbone, which is not in the file."
        inside = f"the backbone, which is in the file: {FAMILIES[family][0]}."
        lines.append(inside if with_backbone else own)
    return lines


def family_of(card: Mapping[str, Any]) -> str:
    """The key in `FAMILIES` of a model's pretrained backbone; empty where it has none."""
    if card["weights"]["source"] in ("none", "random") or _system(card):
        return ""
    return BACKBONES[card["backbone"]["arch"]].family


def sources_of(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What SOURCE.json of each dataset behind a unit says, by name, for its model.json."""
    ingested = [n for n in _names(settings) if (INGESTED / n / "manifest.json").is_file()]
    found = {name: open_volume(name).manifest.get("source", {}) for name in ingested}
    return {name: source for name, source in found.items() if source}


def _names(settings: Mapping[str, Any] | None) -> list[str]:
    """Datasets that a unit trains on, with labels or without, and those of units before it."""
    if not settings:
        return []
    own = [*settings.get("datasets", {}), *settings.get("unlabelled", {})]
    return own + _names(settings.get("source"))


def _system(card: Mapping[str, Any]) -> str:
    """The published system of a model; empty where it has none."""
    return SYSTEMS.get(card.get("regime", {}).get("kind", ""), "")


def _what(card: Mapping[str, Any], with_backbone: bool) -> list[str]:
    weights, regime, system = card["weights"], card["regime"], _system(card)
    origin = f"on {card['backbone']['arch']}"
    if system:
        how = "fine-tuned" if regime.get("finetune") else "used as it is"
        origin = f"the published system {system}, {how}"
        if (prompts := regime.get("prompts", "automatic")) != "automatic":
            origin += f", an oracle: prompted from the labels ({prompts})"
    elif weights["source"] == "none":
        origin = "from random initial values"
    lines = [
        f"# {card['unit']}",
        "",
        f"{_does(card)}: regime `{regime['kind']}`,"
        f" head `{card['head']}`, {origin}, {card['trainable_params']:,} trained parameters.",
    ]
    if weights["source"] != "none":
        where = "in the file, the adapter merged into it" if with_backbone else "not in the file"
        what = "system" if system else "backbone"
        named = f"`{weights['name']}` from `{weights['source']}`, sha256 `{weights['sha256']}`"
        lines.append(f"The {what} is {where}; its weights are {named}.")
    if weights["source"] == "random":
        lines.append("**Random weights: a control, not a model to use.**")
    return lines


def _does(card: Mapping[str, Any]) -> str:
    if _classifies(card):
        return f"Tells whole images apart ({', '.join(card['classes'])})"
    return f"Segments {_organelles(card)} in electron micrographs"


def _classifies(card: Mapping[str, Any]) -> bool:
    return card["head"] in CLASSIFIERS.values()


def _organelles(card: Mapping[str, Any]) -> str:
    datasets = card.get("settings", {}).get("datasets", {}).values()
    names = card.get("classes") or [data.get("organelle") or "mitochondria" for data in datasets]
    return " and ".join(dict.fromkeys(name.replace("_", " ") for name in names)) or "mitochondria"


def _data(card: Mapping[str, Any]) -> list[str]:
    slices, total = card["labelled"]["slices"]
    lines = [
        "## Training data",
        "",
        f"{slices} labelled {'images' if _classifies(card) else 'slices'} of {total}.",
        "",
        "| dataset | voxel (z, y, x) nm | pairing | licence | citation |",
        "|---|---|---|---|---|",
    ]
    for data in datasets_behind(card):
        sizes = () if _classifies(card) else card["voxel_nm"].get(data.name, ())
        voxel = ", ".join(f"{v:g}" for v in sizes)
        pairing = card["pairing"].get(data.name, "")
        licence = data.licence if data.source else f"{data.licence}: ask its owner"
        cells = (data.named, voxel, pairing, licence, data.source.get("citation", ""))
        lines.append(f"| {' | '.join(cells)} |")
    pairings = card["pairing"].items()
    if wrong := [name for name, pairing in pairings if pairing.startswith("lexicographic")]:
        why = "images with other slices' labels, to replicate a mistake. Not a model to use."
        lines += ["", f"**{', '.join(wrong)}: {why}**"]
    return lines


def _terms(card: Mapping[str, Any], with_backbone: bool) -> list[str]:
    return [
        "## Terms",
        "",
        "emadapt is Apache-2.0. What terms of training data mean for an adapter is not settled; to "
        "be safe, take them to hold for the adapter too:",
        "",
        *(f"- {line}" for line in terms_of(card, with_backbone)),
    ]


def _scores(card: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    threshold = card.get("threshold", 0.5)
    lines = [
        "## Scores",
        "",
        "On test slices that training, early stopping and sweeps have not seen; pooled over the "
        f"slices; 95 % interval over columns of about 1 µm; threshold {threshold:g}; one seed.",
        "",
        "| tested on | | slices | IoU | Dice | boundary IoU |",
        "|---|---|---:|---|---:|---:|",
    ]
    for name, test in metrics["test"].items():
        lines.append(f"| {name} | {_seen(card, name)} | {test['n']} | {_score_cells(test)} |")
        by_class = test.get("classes", {}).items()
        lines += [f"| {name}, {one} | | | {_score_cells(own)} |" for one, own in by_class]
    return lines


def _score_cells(scores: Mapping[str, Any]) -> str:
    low, high = scores["iou_ci95"]
    iou = f"{scores['iou']:.3f} ({low:.3f} to {high:.3f})"
    return f"{iou} | {scores['dice']:.3f} | {scores['boundary_iou']:.3f}"


def _image_scores(card: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Scores",
        "",
        "On test images that training, early stopping and sweeps have not seen; 95 % interval over "
        "groups of images; one seed.",
        "",
        "| tested on | | images | AUROC | accuracy | balanced accuracy |",
        "|---|---|---:|---|---|---|",
    ]
    for name, test in metrics["test"].items():
        cells = []
        for score in SCORES:
            low, high = test[f"{score}_ci95"]
            cells.append(f"{test[score]:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {name} | {_seen(card, name)} | {test['n']} | {' | '.join(cells)} |")
    return lines


def _seen(card: Mapping[str, Any], test_set: str) -> str:
    """What a model has seen of a dataset."""
    if test_set in card["data_md5"]:
        return "trained on it"
    behind = datasets_behind(card)
    if roles := [data.role for data in behind if data.name == test_set]:
        return roles[0]
    same = any(data.source.get("name") == test_set for data in behind)
    return "its images under other labels" if same else NEVER


def _limits(card: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> list[str]:
    voxels = " or ".join(f"{card['voxel_nm'][name][1]:g}" for name in card["data_md5"])
    made_for = f"Made for pixels of about {voxels} nm; resample other data to that first."
    if pixel := card["backbone"].get("pixel_nm"):
        made_for = f"Slices are brought to pixels of {pixel:g} nm: state the voxel size rightly."
    lines = [
        "## Limits",
        "",
        f"- {made_for}",
        f"- {_extent(card)} It gives a mask; objects are its connected components.",
        "- It follows its labels' convention of where an edge is; other datasets have others.",
    ]
    tests = metrics["test"] if metrics else {}
    unseen = [(test["iou"], name) for name, test in tests.items() if _seen(card, name) == NEVER]
    if unseen:
        iou, worst = min(unseen)
        expected = f"- On data it has not seen expect less: {iou:.2f} on {worst}."
        lines.append(f"{expected} Label a few slices and fine-tune.")
    elif tests:
        lines.append("- Not tested on any dataset that it was not trained on.")
    else:
        lines.append("- Not tested at all.")
    if few := [name for name, test in tests.items() if test["n"] < 10]:
        lines.append(f"- Fewer than ten test slices ({', '.join(few)}) say little.")
    return lines


def _extent(card: Mapping[str, Any]) -> str:
    """What a prediction sees along z."""
    if patch := card["regime"].get("patch"):
        return f"3D: blocks of {patch[0]} slices are predicted together."
    alone = "by itself" if not card["backbone"].get("context") else "with its two neighbours"
    smooth = card["backbone"].get("smooth_z_nm")
    averaged = f"; probabilities are averaged over {smooth:g} nm along z" if smooth else ""
    return f"Each slice is predicted {alone}{averaged}."


def _provenance(card: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> list[str]:
    md5 = ", ".join(f"{name} {value}" for name, value in card["data_md5"].items())
    rows = {"unit key": card["key"], "study": card["study"], "data md5": md5}
    if metrics:
        rows |= {
            "model md5": metrics["model_md5"],
            **{
                f"validation {said}": f"{metrics[name]:.4f}"
                for name, said in (("val_iou", "IoU"), ("val_auroc", "AUROC"))
                if name in metrics
            },
            "training": card["precision"],
        }
    rows["emadapt"] = card["version"]
    return ["## Provenance", "", *(f"- {name}: {value}" for name, value in rows.items())]
