"""What every diagnostic asks of the features that it is given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from emadapt.errors import InputError


def check_features(
    what: str, features: Sequence[npt.NDArray[np.floating]], names: Sequence[str], least: int = 1
) -> None:
    """Stop at features that are not (n, D) with n of `least` or more, one D, and finite.

    Args:
        what: the diagnostic.
        features: its arrays.
        names: of these, for errors.
        least: rows that each must have.

    Raises:
        InputError: they are not.
    """
    for x, name in zip(features, names, strict=True):
        if x.ndim != 2 or len(x) < least:
            raise InputError(
                f"{what}, {name}",
                found=f"features of shape {x.shape}",
                expected=f"(n, D), n of {least} or more",
                do="Use more slices, and look at the dataset's labels.",
            )
        if bad := x.size - int(np.isfinite(x).sum()):
            raise InputError(
                f"{what}, {name}",
                found=f"{bad} of {x.size} values that are NaN or infinite",
                expected="finite features",
                do="Rebuild the token cache.",
            )
    if len({x.shape[1] for x in features}) > 1:
        dims = ", ".join(f"{x.shape[1]} of {name}" for x, name in zip(features, names, strict=True))
        raise InputError(
            what,
            found=f"features of different dimensions: {dims}",
            expected="features of one backbone",
            do="Rebuild the token cache.",
        )
