"""docs/clusters.md: its scripts are shell scripts, and its commands exist with their options."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from emadapt.cli import main

TEXT = (Path(__file__).resolve().parents[1] / "docs/clusters.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
CALL = re.compile(r"(?:again )?(emadapt .*)")


def emadapt_calls() -> list[list[str]]:
    """The words of each emadapt command in the blocks, also of those inside `$(...)`."""
    text = "\n".join(BLOCKS).replace("\\\n", " ")
    text = re.sub(r"\$\(([^()]*)\)", r"\n\1\n", text)
    lines = [re.split(r"[#|&]", line)[0].strip() for line in text.splitlines()]
    return [shlex.split(found[1]) for line in lines if (found := CALL.match(line))]


@pytest.mark.parametrize("text", BLOCKS)
def test_a_block_is_one_that_bash_takes(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", emadapt_calls(), ids=" ".join)
def test_a_command_exists_with_its_options(words: list[str]) -> None:
    command: click.Command = main
    for word in words[1:]:
        if isinstance(command, click.Group):
            command = command.commands[word]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_commands_were_found() -> None:
    assert len(emadapt_calls()) > 3
