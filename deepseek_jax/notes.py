"""What is said of somebody's files: notes on what was taken for granted, and values cut to a readable length.

What loads with the meaning that the reference gives it loads here, and a note says what was assumed or left out.
What would change a number, or is ambiguous, is an error instead.
"""

import reprlib
import warnings

LONGEST = 160  # characters of a value in a message

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, LONGEST, LONGEST, 40


class CheckpointWarning(UserWarning):
    """Something in a checkpoint was assumed, left out or ignored; the message is one sentence that names it."""


def note(message: str) -> None:
    """Issues a `CheckpointWarning`: in Python a warning, on the command line one ``note: ...`` line on stderr."""
    warnings.warn(message, CheckpointWarning, stacklevel=2)


def shown(value) -> str:
    """A value as a message shows it: its repr, cut where it is long.

    A file's value may have a million characters, an integer may have too many digits to be printed.
    """
    try:
        return _shortened(_SHORT.repr(value))
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"a number of {type(value).__name__} that is too long to print"


def cut(text) -> str:
    """A text of a file or a library, such as a tensor's name or an error, in one line and cut where it is long."""
    return _shortened(" ".join(str(text)[: 4 * LONGEST].split()))


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]} ... {text[-15:]}"
