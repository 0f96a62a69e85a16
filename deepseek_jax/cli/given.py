"""What was given on a command line, before it is parsed: options that say what others default to."""

import itertools


def given(arguments: list[str], option: str) -> str | None:
    """The value given last to an option, as ``--option value`` or ``--option=value``; the parser takes _ for - too."""
    found = None
    for word, after in itertools.pairwise([*arguments, ""]):
        name, sign, value = word.partition("=")
        if name.replace("_", "-") == option:
            found = value if sign else after
    return found


def count(text: str | None) -> int | None:
    """A positive whole number as the parser reads it, 1_000_000 among them; None for anything else."""
    try:
        found = int(text or "")
    except ValueError:
        return None
    return found if found > 0 else None
