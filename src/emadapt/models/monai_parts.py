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
    # `monai/__init__.py` finds its modules with walk_packages.
    with mock.patch.object(pkgutil, "walk_packages", return_value=()):
        from monai.utils import module
    module.walk_packages = pkgutil.walk_packages
    # Its folders import each other in circles, and this is the one to begin with.
    import monai.apps  # noqa: F401


def monai_part(name: str) -> ModuleType:
    """A module of MONAI, such as `losses`, as `import monai.losses` gives it."""
    _begin()
    return importlib.import_module(f"monai.{name}")
