"""The parts of MONAI that are used, without the rest of it.

`import monai` alone runs all of its modules twice, and with them MLflow, transformers and
jsonschema: half of the seconds that pass before a first step of training.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType
from unittest import mock


@functools.cache
def _begin() -> None:
    with mock.patch.object(
        pkgutil, "walk_packages", return_value=()
    ):  # what `monai/__init__.py` finds its modules with
        from monai.utils import module
    module.walk_packages = pkgutil.walk_packages
    import monai.apps  # noqa: F401 (the one of its folders to begin with: others import each other in circles)


def monai_part(name: str) -> ModuleType:
    """A module of MONAI, such as `losses`, as `import monai.losses` gives it."""
    _begin()
    return importlib.import_module(f"monai.{name}")
