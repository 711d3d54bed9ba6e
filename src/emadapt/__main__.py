"""`python -m emadapt` is `emadapt`."""

from emadapt.cli import main

main()
