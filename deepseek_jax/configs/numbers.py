"""Numbers that are written with Python's precision and used with float32's: checked as they are used. Loads no JAX."""

# Between these lie the positive numbers that float32 holds with its whole precision. Devices take smaller ones for 0.
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
# What float32 rounds to 1 begins here.
ONE = 1 - 2.0**-25


def complaint(value: float, low: float = 0.0, high: float = LARGEST) -> str | None:
    """Why a setting cannot be ``value``, a number from ``low`` to ``high`` that float32 can hold; None if it can.

    ``high`` may be inf.
    """
    if not low <= value <= high:
        if abs(low) == LARGEST:
            return f"must be finite, not {value}"
        between = "be finite and at least {:g}" if high == LARGEST else "lie between {:g} and {:g}"
        return f"must {between.format(low, high)}, not {value}"
    if 0 < abs(value) < SMALLEST:
        return f"is used as float32, where {value} counts as 0; the smallest number there is {SMALLEST:.3g}"
    return None


def within(owner, low: float, high: float, *names: str) -> None:
    """Raises ValueError for the first of an object's fields that is not a number between the two."""
    for name in names:
        if problem := complaint(getattr(owner, name), low, high):
            raise ValueError(f"{name} {problem}.")
