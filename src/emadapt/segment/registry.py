"""MLflow's registry: models under a name, in versions, with aliases such as `champion`.

A version is the model of a run, with its card: adapter, head and their settings, not the backbone.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emadapt.errors import InputError
from emadapt.files import cache, file_md5
from emadapt.tracking import store as mlflow_store
from emadapt.tracking.relocate import tracking_uri
from emadapt.tracking.run import Run
from emadapt.tracking.send import update
from emadapt.training.model_card import card_of, terms_of
from emadapt.training.tracked import add_files

SCHEME = "models:/"
DESCRIPTION = 5000
"""Characters of a version's description that MLflow keeps."""
_ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")


def register(root: Path, folder: Path, card: Mapping[str, Any], name: str, alias: str = "") -> int:
    """Add the model of a folder and card as the next version of `name`; returns the version.

    Args:
        root: the project root, whose MLflow is used (MLFLOW_TRACKING_URI wins).
        folder: of the model, whose MLflow run, if there is one, becomes the version's source.
        card: its model.json.
        name: of the registered model; made if it does not exist.
        alias: to point to the new version, and to no other any more.
    """
    store = mlflow_store.client(root)  # before MLflow is imported, which reads what this sets
    from mlflow.exceptions import MlflowException

    study, unit = str(card["study"]), str(card["unit"])
    same = ("unit", "model.md5")
    run = Run(study, unit, {"unit": unit}, same=same, origin="registered", root=root.resolve())
    with tempfile.TemporaryDirectory(prefix="emadapt-") as temporary:
        described = Path(temporary) / "model-card.md"
        described.write_text(card_of(folder, card))
        run.artifacts["model/model-card.md"] = described
        add_files(run, folder, card)
        run.digests = {file: file_md5(path) for file, path in run.artifacts.items()}
        update(store, run)
    run_id, model_id = run.known.run_id, run.known.model_id
    try:
        store.get_registered_model(name)
    except MlflowException:
        store.create_registered_model(name)
    version = store.create_model_version(
        name,
        f"{SCHEME}{model_id}",
        run_id,
        {**run.tags, "terms": "; ".join(terms_of(card))},
        description=card_of(folder, card)[:DESCRIPTION],
        model_id=model_id,
    )
    if alias:
        try:
            store.set_registered_model_alias(name, alias, version.version)
        except MlflowException as error:
            raise _missing(f"alias {alias}", store, error) from error
    return int(version.version)


def fetch(root: Path, address: str) -> Path:
    """The folder of models:/NAME@ALIAS or models:/NAME/VERSION; copied here the first time.

    Raises:
        InputError: there is no such model, or another program made it.
    """
    if not (parts := _ADDRESS.fullmatch(address)):
        found, expected = "no such address", "models:/NAME@ALIAS or models:/NAME/VERSION"
        raise InputError(f"model {address}", found=found, expected=expected, do="Correct it.")
    store, uri = mlflow_store.client(root.resolve()), tracking_uri(root)
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    name, number, alias = parts["name"], parts["version"], parts["alias"]
    try:
        if alias:
            version = store.get_model_version_by_alias(name, alias)
        else:
            version = store.get_model_version(name, number)
    except MlflowException as error:
        raise _missing(address, store, error) from error
    model_id = str(version.source).rpartition("/")[2]
    folder = cache("models") / f"{name}-{version.version}-{model_id}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as part:
        place = f"{SCHEME}{name}/{version.version}"
        got = download_artifacts(place, dst_path=part, tracking_uri=uri, registry_uri=uri)
        if not (Path(got) / "model.json").is_file():
            found, expected = "a model of another program", "one that `emadapt register` made"
            raise InputError(address, found=found, expected=expected, do="Choose another.")
        shutil.move(got, folder)
    return folder


def _missing(what: str, store: Any, error: Exception) -> InputError:
    have = ", ".join(sorted(found.name for found in store.search_registered_models())) or "none"
    return InputError(
        what,
        found=str(error).splitlines()[0][:200],
        expected=f"a registered model; there is {have}",
        do="See `emadapt register`, or the models on MLflow's page.",
    )
