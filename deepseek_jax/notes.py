"""What was taken for granted: one line for each assumption that a reader of somebody's files makes.

What loads with the meaning that the reference gives it loads here, and a note says what was assumed or left out.
What would change a number, or is ambiguous, is an error instead.
"""

import warnings


class CheckpointWarning(UserWarning):
    """Something in a checkpoint was assumed, left out or ignored; the message is one sentence that names it."""


def note(message: str) -> None:
    """Issues a `CheckpointWarning`: in Python a warning, on the command line one ``note: ...`` line on stderr."""
    warnings.warn(message, CheckpointWarning, stacklevel=2)
