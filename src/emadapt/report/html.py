"""Pages in one file: a template of a room, filled, with pictures inside."""

from __future__ import annotations

import base64
from importlib import resources
from typing import Any


def render(room: str, template: str, **facts: Any) -> str:
    """The HTML of a Jinja template that is in a room of the package; facts are escaped.

    Args:
        room: such as "report".
        template: its file name, such as "page.html.jinja".
        facts: what it names.

    Raises:
        jinja2.UndefinedError: the template names what is not among the facts.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = resources.files(f"emadapt.{room}").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(**facts)


def data_address(content: bytes, kind: str = "png") -> str:
    """An image file as an address that has the image itself."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
