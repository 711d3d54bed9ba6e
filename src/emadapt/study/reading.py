"""Settings as a person writes them, read strictly: YAML into frozen dataclasses, every problem named."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

from emadapt.errors import ConfigError

MAX_BYTES, MAX_VALUES = 100_000, 10_000
"""Of a file, and of what it holds once its anchors are followed; a large study has some hundred values."""
NAME = re.compile(
    r"[A-Za-z0-9_]+"
)  # DVC's matrix keys must not contain dots; "-" separates the parts of a unit


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a map.

    Raises:
        ConfigError: it is missing, not YAML, or has something else in it.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if path.exists() and (not path.is_file() or path.stat().st_size > MAX_BYTES):
        raise ConfigError(
            [
                f"{path}: found no plain file, or a large one; expected settings of at most {MAX_BYTES} bytes"
            ]
        )
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text())  # refuses duplicate keys
    except FileNotFoundError:
        raise ConfigError(
            [f"{path}: no such file; run this in the project's root, or `emadapt use demo`"]
        ) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror})"]) from None
    except (
        YAMLError,
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # of a number with 5000 digits, of keys that are lists
        raise ConfigError(
            [f"{path}: not valid YAML: {' '.join(str(error).split())[:500]}"]
        ) from None
    if _is_endless(raw):
        raise ConfigError(
            [
                f"{path}: found more than {MAX_VALUES} values, by anchors that name each other; write them out"
            ]
        )
    if not isinstance(raw, dict):
        raise ConfigError(
            [f"{path}: found {type(raw).__name__}; expected the sections study, datasets, ..."]
        )
    return raw


def _is_endless(value: Any) -> bool:
    """Whether following every anchor gives more than `MAX_VALUES` values."""
    count, left = 0, [value]
    while left and count <= MAX_VALUES:
        count, item = count + 1, left.pop()
        if isinstance(item, dict | list):
            left += item.values() if isinstance(item, dict) else item
    return count > MAX_VALUES


def names_of(value: Any, where: str, problems: list[str]) -> tuple[str, ...]:
    """A list of names, each once; what is wrong is added to `problems`, beginning with `where`."""
    if not isinstance(value, list) or not value or any(not isinstance(v, str) for v in value):
        problems.append(f"{where}: found {value!r}; expected a list of names")
        return ()
    if len(set(value)) < len(value):
        problems.append(f"{where}: a name stands twice in {value}")
    return tuple(value)


def specs_of(kind: type, raw: dict[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """A map of names to settings, as dataclasses `kind`; those with problems are left out."""
    out = {}
    for name, value in raw.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            problems.append(f"{where}: name {name!r} may hold letters, digits and underscores only")
        elif (spec := build(kind, value, f"{where}.{name}", problems)) is not None:
            out[name] = spec
    return out


def build(kind: type, raw: Any, where: str, problems: list[str], start: Any = None) -> Any:
    """The dataclass `kind` from a map of its fields, on top of the values of `start`; None if there are problems."""
    if not isinstance(raw, dict):
        problems.append(f"{where}: found {raw!r}; expected a map of settings")
        return None
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {} if start is None else dataclasses.asdict(start)
    before = len(problems)
    for key, value in raw.items():
        if key not in hints:
            problems.append(f"{where}: unknown key {key!r}; known are {', '.join(hints)}")
            continue
        try:
            values[key] = coerce(hints[key], value)
        except TypeError as error:
            problems.append(f"{where}.{key}: found {value!r}; expected {error}")
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    problems += [
        f"{where}: {name!r} is missing"
        for name in required
        if name not in values and name not in raw
    ]
    return kind(**values) if len(problems) == before else None


def coerce(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`; TypeError with the words for what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in args):
            raise TypeError("one of " + ", ".join(map(str, args)))
        return value
    if origin in (typing.Union, types.UnionType):
        wanted = []
        for option in args:
            try:
                return coerce(option, value)
            except TypeError as error:
                wanted.append(str(error))
        raise TypeError(" or ".join(wanted))
    if origin is tuple:
        if not isinstance(value, list | tuple) or not value:
            raise TypeError("a list that is not empty")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise TypeError(f"a list of {len(args)}")
        return tuple(coerce(args[0], v) for v in value)
    if origin is dict:
        if (
            not isinstance(value, dict)
            or not value
            or any(type(k) is not str or not NAME.fullmatch(k) for k in value)
        ):
            raise TypeError("a map of names (letters, digits and underscores)")
        return {k: coerce(args[1], v) for k, v in value.items()}
    if hint is float and type(value) in (int, float):
        if not abs(value) < 1e12:  # also refuses nan
            raise TypeError("a finite number")
        return float(value)
    if hint is int and type(value) is int and abs(value) >= 2**63:
        raise TypeError("a whole number of at most 64 bits")
    if type(value) is not hint:
        raise TypeError(
            {int: "a whole number", str: "text", bool: "true or false", float: "a number"}[hint]
        )
    return value
