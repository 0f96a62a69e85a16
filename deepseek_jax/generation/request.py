"""What a `Batcher` is asked, and what it answers, bit by bit. Loads no JAX: who speaks to clients imports this only.

Suffixes: L MoE layers, K chosen experts, t tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

MAX_TOP_LOGPROBS = 20
Finish = Literal["stop", "length", "error"]


class Grammar(Protocol):
    """What may follow, asked anew before every token of one choice."""

    def mask(self) -> np.ndarray | None:
        """Packed bits, uint32 or int32 [V / 32, rounded up], token i at bit i % 32 of number i // 32: those that may
        come next. None: all may, as before a text's bound part begins."""

    def accept(self, ids: Sequence[int]) -> None:
        """These came, in order; the last of them may be a stop id."""


class Sight(Protocol):
    """A model's eyes. ``image_id``: the token that stands, repeated, where a picture does; ``tokens``: how often for
    each; ``shape``: of a picture."""

    image_id: int
    tokens: int
    shape: tuple[int, ...]

    def __call__(self, picture: np.ndarray):
        """Embeddings [tokens, D], in the places of the tokens' own, of a picture, float32."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how it is to be continued.

    ``prompt``: token ids. ``stop_ids``: tokens that end a choice (its last one then), at most 16; None for the
    model's ``cfg.eos_ids``, () for none. ``n``: choices, each with random numbers of its own: the i-th is the i-th row
    of ``dsj.generate(model, [prompt] * n, seed=seed)``. ``top_logprobs``: how many alternatives each token is to come
    with, 0 to 20. ``logit_bias``: added to the logits of these ids before anything else, greedy choices too;
    log-probabilities are the model's own all the same. ``grammar``: makes the `Grammar` of a choice, called once for
    each; such a choice takes no drafts. ``use_mtp``: the MTP modules draft, where the batcher has them. ``routing``:
    the experts of each token are wanted, where the batcher records them. ``prompt_logprobs``: the prompt's own tokens
    are to come with log-probabilities, too, and with as many alternatives; then ``max_new_tokens`` may be 0, and
    nothing is taken from kept prefixes. ``pictures``: in the order of their places in the prompt, where the batcher has
    a `Sight`: such a prompt is fed whole, and nothing of it is kept.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_ids: Sequence[int] | None = None
    n: int = 1
    top_logprobs: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Callable[[], Grammar] | None = None
    use_mtp: bool = False
    routing: bool = False
    pictures: Sequence[np.ndarray] = ()
    prompt_logprobs: bool = False


@dataclass(frozen=True, eq=False)
class Delta:
    """What came of one choice in one step: one token or more, and at its end a reason.

    ``request``, ``choice``: what `Batcher.submit` gave, and 0 to n - 1. ``tokens``: the new ids, a stop id included.
    ``logprobs``: of each the model's log-softmax, in nats, no temperature, bias or filter; ``behaviour``: the
    log-probability with which it was drawn. ``top``: of each the likeliest ids and their log-probabilities, best first;
    empty where none were asked for. ``finish``: "stop" (a stop id came, or the grammar lets nothing follow), "length",
    "error" (``error`` says what its grammar raised), None while it goes on. A cancelled request has no further deltas.

    Of the whole choice up to here: ``drafted`` and ``accepted``, drafts verified and those in the output.
    ``cached``: tokens of the prompt that were kept from earlier requests. ``waited``, ``prefilled``: seconds from
    submission to a slot, and from there to the first decoding step. ``routing``: int32 [t, L, K], experts of the tokens
    fed since the last delta, prompt's first, -1 where none; in the end all tokens' but the last one's. None if not
    asked for.

    In a choice's first delta, where they were asked for, ``prompt_logprobs`` and ``prompt_top``: as ``logprobs`` and
    ``top``, of the prompt's tokens but its first, which nothing predicts.
    """

    request: int
    choice: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    behaviour: tuple[float, ...] = ()
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    finish: Finish | None = None
    error: str = ""
    drafted: int = 0
    accepted: int = 0
    cached: int = 0
    waited: float = 0.0
    prefilled: float = 0.0
    routing: np.ndarray | None = None
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True)
class Stats:
    """A batcher's state, and counts since it was made.

    ``slots``, ``running``, ``waiting``: slots there are, those taken, choices that wait for one. ``held``, ``room``:
    tokens that slots in use hold, and tokens that all slots have room for. Counts of tokens: ``prompt``; ``queried``,
    of prompts looked up among kept prefixes, and ``cached``, found there; ``generated``; ``drafted``, ``accepted``.
    ``drafting_steps``: decoding steps of a choice that verified drafts. ``finished``: choices by their reason,
    "cancelled" among them. ``accepted_at``: of ``accepted`` the first, second... drafts of their steps.
    """

    slots: int
    running: int
    waiting: int
    held: int
    room: int
    prompt: int
    queried: int
    cached: int
    generated: int
    drafted: int
    accepted: int
    drafting_steps: int
    finished: Mapping[str, int]
    accepted_at: tuple[int, ...] = ()


class QueueFull(RuntimeError):
    """As many requests wait as may; the message says how many. Trying again later helps."""
