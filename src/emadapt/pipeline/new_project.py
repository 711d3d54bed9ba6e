"""A new project: a folder with the pipeline and the studies, for who has no checkout of emadapt."""

import shutil
from pathlib import Path

from emadapt.errors import InputError

FILES = Path(__file__).with_name("project")
"""What a project begins with; `dot-` in a name becomes a dot. Most are links to the checkout's own
files, which a wheel holds as files."""
NOT_COPIED = shutil.ignore_patterns("results", "*.md", "*.py", "__pycache__")


def new_project(folder: Path) -> None:
    """Write the files of a project into a folder, which may exist and hold other files.

    Raises:
        InputError: one of the files is there already.
    """
    names = [path.name.replace("dot-", ".") for path in FILES.iterdir()]
    if there := sorted(name for name in names if (folder / name).exists()):
        raise InputError(
            folder,
            found=", ".join(there),
            expected="none of these: they would be replaced",
            do="Choose another folder.",
        )
    shutil.copytree(FILES, folder, ignore=NOT_COPIED, dirs_exist_ok=True)
    for path in sorted(FILES.glob("**/dot-*"), reverse=True):
        copied = folder / path.relative_to(FILES)
        copied.rename(copied.with_name(path.name.replace("dot-", ".")))
    own = folder / "studies/mine"
    own.mkdir()
    shutil.copy(folder / "params.yaml", own / "study.yaml")
