"""Reading settings from YAML, and saying what is wrong with them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from emadapt.errors import ConfigError

WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "too_short": "a list that is not empty",
    "string_pattern_mismatch": "text such as {}",
}
"""What pydantic's types of errors are called here; the others keep pydantic's message."""
PATTERNS = {"%": "25%", ">": "'>127'", "[": "lucchi_2 (letters, digits, underscores)"}
"""Examples of text, by a character of the pattern that it has to match."""

MAX_BYTES = 100_000
MAX_VALUES = 10_000
"""Limits of a settings file. A large study has some hundred values."""


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a map.

    Raises:
        ConfigError: it is missing, not YAML, too large, or holds something else.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if path.exists() and (not path.is_file() or path.stat().st_size > MAX_BYTES):
        raise ConfigError([f"{path}: expected a settings file of at most {MAX_BYTES} bytes"])
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text())  # refuses duplicate keys
    except FileNotFoundError:
        do = "Run this in the project's root, or select a study: `emadapt use demo`."
        raise ConfigError([f"{path}: no such file. {do}"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror})"]) from None
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        words = " ".join(str(error).split())[:500]
        raise ConfigError([f"{path}: not valid YAML: {words}"]) from None
    if _is_endless(raw):
        raise ConfigError([f"{path}: more than {MAX_VALUES} values (anchors that repeat anchors?)"])
    if not isinstance(raw, dict):
        found = type(raw).__name__
        raise ConfigError([f"{path}: found {found}; expected the sections study, datasets, ..."])
    return raw


def _is_endless(value: Any) -> bool:
    """Whether following every anchor gives more than `MAX_VALUES` values."""
    count, left = 0, [value]
    while left and count <= MAX_VALUES:
        count, item = count + 1, left.pop()
        if isinstance(item, dict | list):
            left += item.values() if isinstance(item, dict) else item
    return count > MAX_VALUES


def parse(kind: type[BaseModel], raw: Any, where: str, problems: list[str]) -> Any:
    """`raw` as settings of `kind`. What is wrong is added to `problems`, and None returned."""
    if not isinstance(raw, dict):
        problems.append(f"{where}: found {raw!r}; expected a map of settings")
        return None
    try:
        # Through JSON, where a strict model takes a list for a tuple, as YAML has it.
        return kind.model_validate_json(json.dumps(raw, default=str))
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            problems.append(f"{where}: cannot be read ({error})")
            return None
        problems += [f"{where}{line}" for line in _lines(kind, error)]
        return None


def parse_tagged(
    kinds: Mapping[str, type[BaseModel]], raw: Any, where: str, problems: list[str]
) -> Any:
    """The same, where the key `kind` says which settings they are."""
    name = raw.get("kind") if isinstance(raw, dict) else None
    if isinstance(raw, dict) and (not isinstance(name, str) or name not in kinds):
        found = "nothing" if name is None else repr(name)
        problems.append(f"{where}.kind: found {found}; expected one of {', '.join(kinds)}")
        return None
    return parse(kinds.get(str(name), next(iter(kinds.values()))), raw, where, problems)


def nearest(name: str, known: list[str]) -> str:
    """What to say of an unknown name: the known one that it resembles, or all of them."""
    if close := difflib.get_close_matches(name, known, 1):
        return f"did you mean {close[0]!r}?"
    return f"known are {', '.join(known)}"


def _lines(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """One line for each place that has a problem, e.g. `.epochs: found '3'; ...`."""
    places: dict[str, list[str]] = {}
    found: dict[str, Any] = {}
    for problem in error.errors(include_url=False):
        field = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
            places[f": unknown key {field!r}"] = [nearest(field, list(kind.model_fields))]
        elif problem["type"] == "missing":
            places[f": {field!r} is missing"] = []
        else:
            place = f".{field}" if field else ""
            places.setdefault(place, []).append(_words(problem))
            if field:
                found.setdefault(place, problem["input"])
    return [_line(place, words, found.get(place)) for place, words in places.items()]


def _words(problem: Any) -> str:
    """What one problem expected, in plain words."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        examples = [word for char, word in PATTERNS.items() if char in context["pattern"]]
        return WORDS[kind].format(examples[0])
    message = problem["msg"].removeprefix("Input should be ")
    return "expected " + WORDS.get(kind, message)


def _line(place: str, words: list[str], found: Any) -> str:
    expected = " or ".join(dict.fromkeys(words)).replace(" or expected ", " or ")
    if place.startswith(": "):
        return f"{place}; {expected}" if expected else place
    if found is None:
        return f"{place}: {expected}"
    return f"{place}: found {found!r}; {expected}"
