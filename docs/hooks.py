"""Hooks of MkDocs (mkdocs.yml): the README as the first page, the API from docstrings, links as they are on GitHub.

Documents link to files of the repository, relative to where they lie; here these files are added to the site, under their own
paths but for `docs/`, which is its root, and links are rewritten. A link to nothing stays as it is, and `--strict` finds it.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "src/emadapt/api.py"
ALWAYS = ("README.md", "CHANGELOG.md")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def site_path(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def links(text: str) -> list[str]:
    """Targets of relative links, without anchors; not those in code."""
    return [
        target
        for i, part in enumerate(CODE.split(text))
        if i % 2 == 0
        for _, target, _ in LINK.findall(part)
    ]


def linked_files() -> list[str]:
    """Files outside docs/ that documents link to, and those that these link to: paths from the root of the repository."""
    found, left = (
        list(ALWAYS),
        [*ALWAYS, *(p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "docs").glob("*.md")))],
    )
    while left:
        page = left.pop()
        for target in links((ROOT / page).read_text()):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            if (
                path not in found
                and not path.startswith(("docs/", ".."))
                and (ROOT / path).is_file()
            ):
                found.append(path)
                left += [path] if path.endswith(".md") else []
    return found


def rewritten(text: str, page: str) -> str:
    """The text of a document at `page` (from the root of the repository) with links as the site has them."""
    here = posixpath.dirname(site_path(page))

    def move(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[2]))
        if not (ROOT / path).is_file():
            return match[0]
        return match[1] + posixpath.relpath(site_path(path), here or ".") + match[3]

    return "".join(
        part if i % 2 else LINK.sub(move, part) for i, part in enumerate(CODE.split(text))
    )


def api_page() -> str:
    """emadapt.api as a page: each public function with its signature and docstring, read without importing it."""
    module = ast.parse(API.read_text())
    parts = [f"# Python API\n\n`from emadapt import api`\n\n{ast.get_docstring(module)}"]
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            parts.append(
                f"## {node.name}\n\n```python\n{signature(node)}\n```\n\n{as_markdown(ast.get_docstring(node) or '')}"
            )
    return "\n\n".join(parts) + "\n"


def signature(node: ast.FunctionDef) -> str:
    """Of a function: on one line where it fits, else an argument a line."""
    own = node.args
    bare = [None] * (len(own.args) - len(own.defaults))
    pairs = [
        *zip(own.args, [*bare, *own.defaults], strict=True),
        *zip(own.kwonlyargs, own.kw_defaults, strict=True),
    ]
    given = [
        ast.unparse(arg) + (f" = {ast.unparse(default)}" if default else "")
        for arg, default in pairs
    ]
    if own.kwonlyargs:
        given.insert(len(own.args), "*")
    result = ast.unparse(node.returns) if node.returns else "None"
    line = f"{node.name}({', '.join(given)}) -> {result}"
    return (
        line
        if len(line) <= 90
        else f"{node.name}(\n" + "".join(f"    {g},\n" for g in given) + f") -> {result}"
    )


def as_markdown(docstring: str) -> str:
    """A docstring in Google's style: examples as code, sections as lists."""
    out, block = [], ""
    for paragraph in docstring.split("\n\n"):
        head, _, rest = paragraph.partition("\n")
        if head.startswith(">>>"):
            block = "```pycon\n" + paragraph + "\n```"
        elif head in ("Args:", "Raises:"):
            items = re.sub(r"\n {8,}", " ", rest)  # an item that goes on in the next line
            block = f"**{head[:-1]}**\n\n" + re.sub(r"(?m)^ {4}(\w+): ", r"- `\1`: ", items)
        elif head == "Returns:":
            block = f"**Returns** {' '.join(rest.split())}"
        else:
            block = paragraph
        out.append(block)
    return "\n\n".join(out)


def on_files(files: Any, config: Any) -> Any:
    """Add what is not in docs/."""
    for path in linked_files():
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "api.md", content=api_page()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links."""
    if page.file.src_uri == "api.md":
        return markdown
    in_docs = (ROOT / "docs" / page.file.src_uri).is_file()
    source = (
        "README.md"
        if page.file.src_uri == "index.md"
        else f"docs/{page.file.src_uri}"
        if in_docs
        else page.file.src_uri
    )
    return rewritten(markdown, source)
