"""`python -m emadapt` is `emadapt`."""

from emadapt.cli import main

if __name__ == "__main__":  # processes that this one spawns read the file again, under another name
    main()
