"""What a command takes before it does anything, next to an interpreter that does nothing."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.timing import print_table, seconds

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "emadapt --help": ["-m", "emadapt", "--help"],
    "emadapt check": ["-m", "emadapt", "check"],
    "emadapt plan": ["-m", "emadapt", "plan"],
    "dvc repro (nothing to do)": ["-m", "dvc", "repro", "--quiet"],
}


def measured(words: list[str]) -> float:
    """Seconds of a command in the checkout."""
    return seconds(lambda: subprocess.run([sys.executable, *words], capture_output=True), 3)


if __name__ == "__main__":
    print_table([{"command": name, "seconds": measured(words)} for name, words in COMMANDS.items()])
