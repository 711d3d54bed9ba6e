"""A card for each model: what it is, its data and terms, its scores, and its limits.

Sections follow Mitchell et al. 2019, Model Cards for Model Reporting (arXiv 1810.03993).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from emadapt.data.ingest import INGESTED, open_volume
from emadapt.files import file_md5
from emadapt.models.archs import BACKBONES
from emadapt.study.datasets import INTERIOR_BOUNDARY
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
UNTRAINED, EARLIER = "not trained on", "through the model that it starts from"


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
    from jinja2 import Environment, StrictUndefined

    tests = metrics["test"] if metrics else {}
    seen = {name: _seen(card, name) for name in tests}
    unseen = [
        (test["iou"], name)
        for name, test in tests.items()
        if seen[name] == UNTRAINED and "iou" in test
    ]
    pairings = card["pairing"].items()
    template = resources.files("emadapt.training").joinpath("model_card.md.jinja")
    jinja = Environment(  # noqa: S701 - Markdown, not HTML
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return jinja.from_string(template.read_text(encoding="utf-8")).render(
        card=card,
        metrics=metrics,
        with_backbone=with_backbone,
        classifies=card["head"] in CLASSIFIERS.values(),
        organelles=_organelles(card),
        origin=_origin(card),
        scratch=card["weights"]["source"] == "none",
        behind=datasets_behind(card),
        mispaired=[name for name, pairing in pairings if pairing.startswith("lexicographic")],
        terms=terms_of(card, with_backbone),
        tests=tests,
        seen=seen,
        interval=_interval,
        worst=min(unseen, default=None),
        few=[name for name, test in tests.items() if test["n"] < 10],
        of_volumes=any(own.get("layout") == "volumes" for own in _datasets(card)),
        bounded=tuple(card.get("classes", ())) == INTERIOR_BOUNDARY,
    )


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
    manifests = _manifests(_names(settings))
    found = {name: manifest.get("source", {}) for name, manifest in manifests.items()}
    return {name: source for name, source in found.items() if source}


def _manifests(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Manifests of those datasets that are ingested here."""
    ingested = [name for name in names if (INGESTED / name / "manifest.json").is_file()]
    return {name: open_volume(name).manifest for name in ingested}


def _names(settings: Mapping[str, Any] | None) -> list[str]:
    """Datasets that a unit trains on, with labels or without, and those of units before it."""
    if not settings:
        return []
    return [*settings.get("datasets", {}), *_names(settings.get("source"))]


def _system(card: Mapping[str, Any]) -> str:
    """The published system of a model; empty where it has none."""
    return SYSTEMS.get(card.get("regime", {}).get("kind", ""), "")


def _origin(card: Mapping[str, Any]) -> str:
    """What a model was made of."""
    regime = card["regime"]
    if system := _system(card):
        how = "fine-tuned" if regime.get("finetune") else "used as it is"
        prompts = regime.get("prompts", "automatic")
        oracle = f", an oracle: prompted from the labels ({prompts})"
        return f"the published system {system}, {how}{'' if prompts == 'automatic' else oracle}"
    if card["weights"]["source"] == "none":
        return "from random initial values"
    return f"on {card['backbone']['arch']}"


def _organelles(card: Mapping[str, Any]) -> str:
    names = card.get("classes", ())
    if not names or tuple(names) == INTERIOR_BOUNDARY:
        names = [data.get("organelle") or "mitochondria" for data in _datasets(card)]
    return " and ".join(dict.fromkeys(name.replace("_", " ") for name in names)) or "mitochondria"


def _datasets(card: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Settings of the datasets that a model was trained on."""
    return list(card.get("settings", {}).get("datasets", {}).values())


def _seen(card: Mapping[str, Any], test_set: str) -> str:
    """What a model has seen of a dataset."""
    if test_set in card["data_md5"]:
        return "trained on it"
    behind = datasets_behind(card)
    if roles := [data.role for data in behind if data.name == test_set]:
        return roles[0]
    images = {
        n: m["image_md5"] for n, m in _manifests([test_set, *(d.name for d in behind)]).items()
    }
    tested = images.pop(test_set, None)
    same = tested in images.values() or any(d.source.get("name") == test_set for d in behind)
    return "its images under other labels" if same else UNTRAINED


def _interval(scores: Mapping[str, Any], name: str) -> str:
    """A score with its 95 % interval."""
    low, high = scores[f"{name}_ci95"]
    return f"{scores[name]:.3f} ({low:.3f} to {high:.3f})"
