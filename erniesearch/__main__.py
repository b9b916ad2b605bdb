"""``python -m erniesearch``: the command line, for launchers that start a module."""

from erniesearch.cli import entry

if __name__ == "__main__":
    entry()
