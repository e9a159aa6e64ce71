"""``python -m leantune``: the command line, for launchers that start a module in every process."""

from leantune.cli import main

if __name__ == "__main__":
    main()
