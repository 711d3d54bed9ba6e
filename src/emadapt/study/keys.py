"""Keys: hashes of all that a result depends on.

The `affects` of each field says which settings those are (`study.strict.setting`).
"""

from __future__ import annotations

import hashlib
import json
import typing
from typing import Any

from emadapt.study.strict import Affects, Settings

ORDER: tuple[Affects, ...] = typing.get_args(Affects)


def affecting(settings: Settings, result: Affects) -> dict[str, Any]:
    """The settings that change `result`, as JSON values.

    What changes tokens changes weights as well, and what changes weights changes scores.
    """
    earlier = ORDER[: ORDER.index(result) + 1]
    names = {
        name
        for name, field in type(settings).model_fields.items()
        if _affects(field.json_schema_extra) in earlier
    }
    return settings.model_dump(mode="json", include=names)


def _affects(extra: Any) -> Affects:
    """A field without `setting` is a tag such as `kind`, which changes the weights."""
    return extra["affects"] if extra else "weights"


def digest(value: Any) -> str:
    """Sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
