"""MLflow's registry: models under a name, in versions, with aliases such as `champion`.

A version holds the adapter and head with their settings, scores and model card. It does not hold
the backbone.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emadapt.errors import InputError
from emadapt.files import cache, file_md5, write_json
from emadapt.tracking import store as mlflow_store
from emadapt.tracking.relocate import tracking_uri
from emadapt.training.model_card import card_of, metrics_of, terms_of

SCHEME = "models:/"
CODE = Path(__file__).with_name("served.py")
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
    root = root.resolve()
    store = mlflow_store.client(root)  # before MLflow is imported, which reads what this sets
    from mlflow.exceptions import MlflowException

    study = str(card["study"])
    tags = {"unit": str(card["unit"]), "model.md5": file_md5(folder / "model.safetensors")}
    run = mlflow_store.find_run(root, study, tags)
    with tempfile.TemporaryDirectory(prefix="emadapt-") as temporary:
        pyfunc = Path(temporary) / "pyfunc"
        _save(folder, card, pyfunc)
        experiment = mlflow_store.experiment_of(store, root, study)
        made = store.create_logged_model(experiment, name, run, tags)
        store.log_model_artifacts(made.model_id, str(pyfunc))
    store.finalize_logged_model(made.model_id, "READY")
    try:
        store.get_registered_model(name)
    except MlflowException:
        store.create_registered_model(name)
    version = store.create_model_version(
        name,
        f"{SCHEME}{made.model_id}",
        run,
        {**tags, "terms": "; ".join(terms_of(card))},
        description=card_of(folder, card)[:DESCRIPTION],
        model_id=made.model_id,
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
        model = Path(got) / "artifacts/model"
        if not (model / "model.json").is_file():
            found, expected = "a model of another program", "one that `emadapt register` made"
            raise InputError(address, found=found, expected=expected, do="Choose another.")
        shutil.move(model, folder)
    return folder


def _save(folder: Path, card: Mapping[str, Any], pyfunc: Path) -> None:
    """Write MLflow's model: adapter and head, the code that loads them, a signature."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    import emadapt

    own = pyfunc.with_name("model")
    own.mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(folder / name, own)
    if metrics := metrics_of(folder, card):
        write_json(own / "metrics.json", metrics)
    (own / "model-card.md").write_text(card_of(folder, card))
    given, found = (
        Schema([TensorSpec(np.dtype(name), (-1, -1, -1))]) for name in ("uint8", "float32")
    )  # Z, Y, X
    voxel = [float(v) for v in next(iter(card["voxel_nm"].values()))]
    params = ParamSchema([ParamSpec("voxel_nm", "double", voxel, (-1,))])
    example = np.random.default_rng(0).integers(0, 256, (1, 64, 64), dtype=np.uint8)
    save_model(
        pyfunc,
        python_model=str(CODE),
        artifacts={"model": str(own)},
        signature=ModelSignature(given, found, params),
        input_example=example,
        pip_requirements=[f"emadapt=={emadapt.__version__}"],
    )


def _missing(what: str, store: Any, error: Exception) -> InputError:
    have = ", ".join(sorted(found.name for found in store.search_registered_models())) or "none"
    return InputError(
        what,
        found=str(error).splitlines()[0][:200],
        expected=f"a registered model; there is {have}",
        do="See `emadapt register`, or the models on MLflow's page.",
    )
