"""MLflow's registry: a model under a name, in versions, with aliases such as `champion` that say which one to use.

A version holds the adapter and head with their settings, scores and model card, and not the backbone.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from emadapt.errors import InputError
from emadapt.files import write_json
from emadapt.segment.model import Model
from emadapt.tracking import store as mlflow_store
from emadapt.training.model_card import card_of, metrics_of, terms_of

COPIES = Path("scratch/models")
"""Where versions lie that were fetched from the registry, by MLflow's id of the model."""
SCHEME = "models:/"
_ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")
CODE = Path(__file__).with_name("served.py")
DESCRIPTION = 5000
"""Characters of a version's description that MLflow keeps."""


def register(root: Path, model: Model, name: str) -> int:
    """Add a trained model to the registry as the next version of `name`.

    Args:
        root: the project root, whose lab book it goes to (MLFLOW_TRACKING_URI wins).
        model: of a unit that was trained here; its run in the lab book, where there is one, becomes the version's source.
        name: of the registered model; made where it is missing.

    Returns:
        The version.
    """
    from emadapt.training.train import file_md5

    store, card = (
        mlflow_store.client(root.resolve()),
        model.card,
    )  # first, since it sets what MLflow's import reads
    from mlflow.exceptions import MlflowException

    tags = {"unit": model.name, "model.md5": file_md5(model.folder / "model.safetensors")}
    run = mlflow_store.find_run(root, str(card["study"]), tags)
    with tempfile.TemporaryDirectory(prefix="emadapt-") as folder:
        _save(model, Path(folder) / "pyfunc")
        made = store.create_logged_model(
            mlflow_store.experiment_of(store, root.resolve(), str(card["study"])), name, run, tags
        )
        store.log_model_artifacts(made.model_id, str(Path(folder) / "pyfunc"))
    store.finalize_logged_model(made.model_id, "READY")
    try:
        store.get_registered_model(name)
    except MlflowException:
        store.create_registered_model(name)
    tags["terms"] = "; ".join(terms_of(card))
    text = card_of(model.folder, card)[:DESCRIPTION]
    version = store.create_model_version(
        name, f"{SCHEME}{made.model_id}", run, tags, description=text, model_id=made.model_id
    )
    return int(version.version)


def promote(root: Path, name: str, version: int, alias: str) -> None:
    """Let an alias point to a version, and to no other.

    Raises:
        InputError: there is no such version, or MLflow does not take the alias.
    """
    store = mlflow_store.client(root.resolve())
    from mlflow.exceptions import MlflowException

    try:
        store.get_model_version(name, str(version))
        store.set_registered_model_alias(name, alias, str(version))
    except MlflowException as error:
        raise _missing(f"{name}, version {version}, alias {alias}", store, error) from error


def fetch(root: Path, address: str) -> Path:
    """The folder of a registered model, as `train` writes one; copied from the registry the first time.

    Args:
        root: the project root.
        address: models:/NAME@ALIAS or models:/NAME/VERSION.

    Raises:
        InputError: there is none.
    """
    if not (parts := _ADDRESS.fullmatch(address)):
        raise InputError(
            f"model {address}",
            found="no address of a registered model",
            expected="models:/NAME@ALIAS or models:/NAME/VERSION",
            do="Correct it.",
        )
    store, uri = mlflow_store.client(root.resolve()), mlflow_store.tracking_uri(root)
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        version = (
            store.get_model_version_by_alias(parts["name"], parts["alias"])
            if parts["alias"]
            else store.get_model_version(parts["name"], parts["version"])
        )
    except MlflowException as error:
        raise _missing(address, store, error) from error
    folder = (
        root
        / COPIES
        / f"{parts['name']}-{version.version}-{str(version.source).rpartition('/')[2]}"
    )
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as part:
            place = f"{SCHEME}{parts['name']}/{version.version}"
            got = (
                Path(download_artifacts(place, dst_path=part, tracking_uri=uri, registry_uri=uri))
                / "artifacts/model"
            )
            if not (got / "model.json").is_file():
                raise InputError(
                    address,
                    found="a model of another program",
                    expected="one that `emadapt register` made",
                    do="Choose another one.",
                )
            shutil.move(got, folder)
    return folder


def _save(model: Model, folder: Path) -> None:
    """Write MLflow's model: adapter and head with what they need to be built, code that loads them, a signature, an example."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    import emadapt
    from emadapt.segment.onnx_graph import probe

    own = folder.with_name("model")
    own.mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(model.folder / name, own)
    if metrics := metrics_of(model.folder, model.card):
        write_json(own / "metrics.json", metrics)
    (own / "model-card.md").write_text(card_of(model.folder, model.card))
    voxel = list(next(iter(model.voxels.values())))
    given, found = (
        Schema([TensorSpec(np.dtype(name), (-1, -1, -1))]) for name in ("uint8", "float32")
    )  # Z, Y, X
    signature = ModelSignature(
        given, found, ParamSchema([ParamSpec("voxel_nm", "double", voxel, (-1,))])
    )
    example, needs = probe(1, 64, 64, 0)[0].astype(np.uint8), [f"emadapt=={emadapt.__version__}"]
    save_model(
        folder,
        python_model=str(CODE),
        artifacts={"model": str(own)},
        signature=signature,
        input_example=example,
        pip_requirements=needs,
    )


def _missing(what: str, store: Any, error: Exception) -> InputError:
    have = ", ".join(sorted(found.name for found in store.search_registered_models())) or "none"
    return InputError(
        what,
        found=str(error).splitlines()[0][:200],
        expected=f"a registered model; there is {have}",
        do="See `emadapt register`, or the models on MLflow's page.",
    )
