"""Figures that papers and releases publish, as data: source, rounding, and the function that states it here."""
