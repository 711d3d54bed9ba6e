"""Errors that a user can act on: the thing, what was found, what was expected, what to do."""

import functools
from pathlib import Path
from typing import Any


class EmadaptError(Exception):
    """Base of every error raised on purpose; the command line prints it and exits with 2."""


class ConfigError(EmadaptError):
    """One or more problems in params.yaml; `problems` holds one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class InputError(EmadaptError):
    """Bad input, found before work starts.

    Args:
        what: the file, folder or setting at fault.
        found: what is there.
        expected: what should be there.
        do: what the user can do about it.
    """

    def __init__(self, what: str | Path, *, found: str, expected: str, do: str) -> None:
        self.what, self.found, self.expected, self.do = str(what), found, expected, do
        super().__init__(f"{what}: found {found}; expected {expected}. {do}")

    def __reduce__(self) -> tuple[Any, ...]:
        """So that it reaches another process whole."""
        return functools.partial(
            type(self), found=self.found, expected=self.expected, do=self.do
        ), (self.what,)


def not_installed(package: str, extra: str) -> InputError:
    """That a package of one of the optional extras is missing."""
    do = f"Install it: pip install 'emadapt[{extra}]'."
    return InputError(package, found="not installed", expected=f"the extra `{extra}`", do=do)


def first_line(error: Exception) -> str:
    """First line of what an error says, or its type; at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
