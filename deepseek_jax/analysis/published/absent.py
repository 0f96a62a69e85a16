"""Published figures that are not stated here: measurements of the authors'."""

from deepseek_jax.analysis.published.figure import Absent

_MHC, _R1, _V2 = "2512.24880", "2501.12948", "2405.04434"
_SERVERS = "their servers"
_RUN = "their run, which it was set for"

ABSENT = (
    Absent("mhc-overhead", "mHC, time added with 4 streams at 27B", _MHC, "6.7%", "their cluster"),
    Absent("r1-zero-steps", "R1-Zero, steps", _R1, "10,400", _RUN),
    Absent("v2-generation", "V2, generation to DeepSeek 67B's", f"{_V2} abstract", "5.76x", _SERVERS),
    Absent("v2-generation-rate", "V2, tokens written a second", f"{_V2} §3.2.3", "over 50K", _SERVERS),
    Absent("v2-prefill-rate", "V2, tokens read a second", f"{_V2} §3.2.3", "over 100K", _SERVERS),
)  # fmt: skip
