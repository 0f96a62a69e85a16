"""How fast a run is: tokens a second, MFU, the wait for data. Loads no JAX."""

import time
from collections.abc import Callable


class Throughput:
    """Tokens a second, MFU and the wait for data over windows of steps that hold nothing but steps.

    After compilation, an evaluation or a save `restart` begins a new window, so that their time counts nowhere. The
    caller waits for the last step's values before `measure`: steps run on after they are called.
    """

    def __init__(
        self,
        flops_per_token: float,
        peak_flops: float | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """``flops_per_token``: of training (`Counts.flops_per_token`, + ``flops_per_token_mtp`` where MTP trains).
        ``peak_flops``: of all devices together, a second; None where it is unknown."""
        self.flops_per_token, self.peak_flops, self.clock = flops_per_token, peak_flops, clock
        self.restart()

    def restart(self) -> None:
        self.began, self.tokens, self.steps, self.waited = self.clock(), 0, 0, 0.0

    def step(self, tokens: int, data_wait: float) -> None:
        """Counts a step of ``tokens`` that waited ``data_wait`` seconds for its batch."""
        self.tokens, self.steps, self.waited = self.tokens + tokens, self.steps + 1, self.waited + data_wait

    def measure(self) -> dict[str, float | None]:
        """ "tokens_per_second", "mfu" (a fraction) and "data_wait" (seconds a step); None where nothing was measured or
        the peak is unknown. Begins a new window."""
        seconds, tokens, steps, waited = self.clock() - self.began, self.tokens, self.steps, self.waited
        self.restart()
        if not steps or seconds <= 0:
            return {"tokens_per_second": None, "mfu": None, "data_wait": None}
        rate = tokens / seconds
        mfu = None if self.peak_flops is None else rate * self.flops_per_token / self.peak_flops
        return {"tokens_per_second": rate, "mfu": mfu, "data_wait": waited / steps}
