"""The one exception that a user's mistake raises."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input, the configuration or the environment.

    Its message is one line that names the file, line, key or shape and the remedy; the command
    line prints it without a traceback and exits with status 2.
    """


class RankFailed(RuntimeError):
    """One rank cannot go on, and nothing in the input is to blame: a process that died, a full
    disk. Its message is one line too; that rank prints it and exits with status 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known word closest to ``word``, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
