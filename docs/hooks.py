"""Hooks of MkDocs (mkdocs.yml): the README as first page, the Python API, links outside docs/.

Documents link to files of the repository as on GitHub. Here those files are added to the site under
their own paths (without `docs/`), and links are rewritten. MkDocs reports links to nothing.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "src/emadapt/api.py"
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside docs/ that documents link to, and the page of the API."""
    for path in linked_files():
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "api.md", content=api_page()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page."""
    uri = page.file.src_uri
    if uri == "api.md":
        return markdown
    if uri == "index.md":
        return rewritten(markdown, "README.md")
    return rewritten(markdown, f"docs/{uri}" if (ROOT / "docs" / uri).is_file() else uri)


def site_path(path: str) -> str:
    """Where a file of the repository is in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def resolved(target: str, page: str) -> str:
    """The path, from the root of the repository, that a link on a page leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def linked_files() -> list[str]:
    """Files outside docs/ that the documents link to, directly or through such a file."""
    found = ["README.md", "CHANGELOG.md"]
    pages = [*found, *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
    while pages:
        page = pages.pop()
        text = CODE.sub("", (ROOT / page).read_text())
        for path in (resolved(link[1], page) for link in LINK.findall(text)):
            outside = not path.startswith(("docs/", ".."))
            if outside and path not in found and (ROOT / path).is_file():
                found.append(path)
                pages += [path] if path.endswith(".md") else []
    return found


def rewritten(text: str, page: str) -> str:
    """The text of a page with links as the site has them; code stays as it is."""
    here = posixpath.dirname(site_path(page)) or "."

    def move(link: re.Match[str]) -> str:
        path = resolved(link[2], page)
        if not (ROOT / path).is_file():
            return link[0]
        return link[1] + posixpath.relpath(site_path(path), here) + link[3]

    parts = CODE.split(text)  # text and code in turns
    return "".join(part if i % 2 else LINK.sub(move, part) for i, part in enumerate(parts))


def api_page() -> str:
    """`emadapt.api` as a page, read without importing it."""
    module = ast.parse(API.read_text())
    parts = [f"# Python API\n\n`from emadapt import api`\n\n{ast.get_docstring(module)}"]
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            result = ast.unparse(node.returns) if node.returns else "None"
            signature = f"{node.name}({ast.unparse(node.args)}) -> {result}"
            parts.append(f"## {node.name}\n\n```python\n{signature}\n```")
            parts.append(as_markdown(ast.get_docstring(node) or ""))
    return "\n\n".join(parts) + "\n"


def as_markdown(docstring: str) -> str:
    """A docstring in Google's style: examples as code, sections as lists."""
    blocks = []
    for paragraph in docstring.split("\n\n"):
        head, _, rest = paragraph.partition("\n")
        if head.startswith(">>>"):
            blocks.append(f"```pycon\n{paragraph}\n```")
        elif head in ("Args:", "Raises:"):
            items = re.sub(r"\n {8,}", " ", rest)  # an item that continues on the next line
            items = re.sub(r"(?m)^ {4}(\w+): ", r"- `\1`: ", items)
            blocks.append(f"**{head[:-1]}**\n\n{items}")
        elif head == "Returns:":
            blocks.append(f"**Returns** {' '.join(rest.split())}")
        else:
            blocks.append(paragraph)
    return "\n\n".join(blocks)
