"""What every diagnostic asks of the features that it is given."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError


def check_features(
    what: str, features: Mapping[str, npt.NDArray[np.floating]], least: int = 1
) -> None:
    """Stop a diagnostic (`what`) at named features that it cannot use.

    Raises:
        InputError: not (n, D) with n of `least` or more, not finite, or of different D.
    """
    for name, x in features.items():
        where = f"{what}, {name}"
        if x.ndim != 2 or len(x) < least:
            found, expected = f"features of shape {x.shape}", f"(n, D), n of {least} or more"
            raise InputError(where, found=found, expected=expected, do="Use more slices.")
        if bad := x.size - int(np.isfinite(x).sum()):
            found = f"{bad} of {x.size} values that are NaN or infinite"
            raise _stale(where, found, "finite features")
    if len({x.shape[1] for x in features.values()}) > 1:
        dims = ", ".join(f"{x.shape[1]} of {name}" for name, x in features.items())
        raise _stale(what, f"features of different dimensions: {dims}", "one backbone's")


def _stale(where: str, found: str, expected: str) -> InputError:
    return InputError(where, found=found, expected=expected, do="Rebuild the token cache.")
