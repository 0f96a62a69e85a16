"""What a request asks of a slot, checked before anything runs; and what a slot holds.

Suffixes: S tokens of room in a slot, N stop ids, V vocabulary.
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from deepseek_jax.generation.arguments import check_count, check_drafts, check_ids, check_stops
from deepseek_jax.generation.loop import TOP
from deepseek_jax.generation.request import MAX_TOP_LOGPROBS, Delta, Finish, Grammar, Request, Sight
from deepseek_jax.generation.sampling import Sampling, make_sampling
from deepseek_jax.generation.slots import STOPS, Row
from deepseek_jax.notes import shown


@dataclass(frozen=True)
class Offer:
    """What a batcher has: ``slots``, each with room for ``length`` tokens; ``depth``: MTP modules in use; ``routing``:
    experts are recorded; ``sight``: of a model that is shown pictures."""

    cfg: Any  # of the model
    slots: int
    length: int
    depth: int
    routing: bool
    sight: Sight | None = None

    def __post_init__(self):
        if self.routing and self.cfg.moe is None:
            raise ValueError(f"routing=True, but {self.cfg.name} has no experts.")


class GrammarFailed(RuntimeError):
    """A choice's grammar raised something: it came with the request, and ends no other."""


@dataclass(eq=False)
class Choice:
    """One text of a request, from the queue to its end.

    ``request``, ``number``: as `Delta` names it. ``prompt``, ``stops``, ``seed``: its own. ``submitted``, ``admitted``,
    ``began``: seconds of a clock. ``cached``: tokens of the prompt that were not fed. ``reported``: tokens whose
    experts were. ``scored``: the prompt's log-probabilities are still to be told.
    """

    request: int
    number: int
    given: Request
    prompt: list[int]
    stops: list[int]
    seed: int
    submitted: float
    grammar: Grammar | None = None
    admitted: float = 0.0
    began: float = 0.0
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    reported: int = 0
    scored: bool = False

    @property
    def bound(self) -> bool:
        return self.given.grammar is not None

    def allowed(self) -> np.ndarray | None:
        """uint32 [V / 32]: the bits of what the grammar lets follow; None for anything. Raises GrammarFailed."""
        try:
            self.grammar = self.grammar or self.given.grammar()
            mask = self.grammar.mask()
        except Exception as error:
            raise GrammarFailed(f"the grammar failed: {error}") from error
        return None if mask is None else np.asarray(mask).view(np.uint32)

    def accept(self, tokens: list[int]) -> None:
        """Raises GrammarFailed."""
        try:
            self.grammar.accept(tokens)
        except Exception as error:
            raise GrammarFailed(f"the grammar failed: {error}") from error

    def heard(self, tokens: np.ndarray, logprob: np.ndarray, behaviour: np.ndarray, top: dict[str, np.ndarray]) -> dict:
        """The fields of a `Delta` that say what one call has brought."""
        check_finite(logprob)
        most, new = self.given.top_logprobs, (tuple(a.tolist()) for a in (tokens, logprob, behaviour))
        found = dict(zip(("tokens", "logprobs", "behaviour"), new, strict=True))
        return found | ({"top": alternatives({k: a[:, :most] for k, a in top.items()})} if most else {})

    def told(self, logprob_S: np.ndarray, top: dict[str, np.ndarray]) -> dict[str, tuple]:
        """The fields of a `Delta` that say, once, what a prompt's own tokens were given; ``top``: [S, ...]."""
        own, most, self.scored = slice(1, len(self.prompt)), self.given.top_logprobs, False
        check_finite(logprob_S[own])
        found = {"prompt_logprobs": tuple(logprob_S[own].tolist())}
        return found | ({"prompt_top": alternatives({k: a[own, :most] for k, a in top.items()})} if most else {})

    def delta(self, finish: Finish | None, error: str, said: dict) -> Delta:
        """``said``: what is new."""
        return Delta(
            self.request,
            self.number,
            **{"tokens": (), "logprobs": ()} | said,
            finish=finish,
            error=error,
            drafted=self.drafted,
            accepted=self.accepted,
            cached=self.cached,
            waited=self.admitted - self.submitted,
            prefilled=self.began - self.admitted,
        )


class Phase(Enum):
    """A twin waits for another's prompt to be fed, and goes on from there."""

    FREE = "free"
    ENTERING = "entering"
    TWIN = "twin"
    FEEDING = "feeding"
    RUNNING = "running"


@dataclass(eq=False)
class Slot:
    """``choice``: whose it is. ``tokens``: known ones, of which the first ``fed`` are in the cache, also when it is
    free. ``twins``: slots that are to go on from this one's prompt. ``used``: when it was last, by a count.
    ``seen``: embeddings of its prompt's pictures, None where it has none."""

    number: int
    phase: Phase = Phase.FREE
    choice: Choice | None = None
    tokens: list[int] = field(default_factory=list)
    fed: int = 0
    twins: list["Slot"] = field(default_factory=list)
    used: int = 0
    seen: np.ndarray | None = None

    def kept(self, prompt: list[int], again: int) -> int:
        """Tokens of a prompt that are in the cache, less those to be fed ``again``. Its very last is decoding's first.

        With MTP modules twice as many as they are: they have seen the end of a text with drafts in the place of tokens,
        or not at all. None where pictures were seen: of those the ids say nothing.
        """
        if self.seen is not None:
            return 0
        return max(0, min(shared(self.tokens, prompt), self.fed, len(prompt) - 1) - again)


def shared(a: list[int], b: list[int]) -> int:
    """How many tokens two lists have in common from the start."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(differ[0]) if differ.size else size


def alternatives(top: dict[str, np.ndarray]) -> tuple[tuple[tuple[int, float], ...], ...]:
    """The likeliest ids with their log-probabilities, token by token, of arrays [t, ...] of both."""
    ids, values = (top[name].tolist() for name in TOP)
    return tuple(tuple(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True))


def check_finite(logprobs: np.ndarray) -> None:
    if not np.isfinite(logprobs).all():
        raise ValueError("the model's logits are not finite: its weights hold NaN or inf.")


def check_request(request: Request, offer: Offer) -> None:
    """Raises ValueError, in a sentence, for what cannot be continued. Reads nothing that changes."""
    if not isinstance(request, Request):
        raise ValueError(f"a batcher takes a generation.request.Request, not {shown(request)}.")
    cfg, given = offer.cfg, request
    prompt = check_ids("prompt", given.prompt, cfg.vocab_size)
    if given.max_new_tokens != 0 or not given.prompt_logprobs:
        check_count("max_new_tokens", given.max_new_tokens)
    needed = len(prompt) + given.max_new_tokens
    if needed > offer.length:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {given.max_new_tokens} new ones make {needed}, beyond the "
            f"{offer.length} that a slot takes; shorten the prompt or lower max_new_tokens."
        )
    check_count("n", given.n)
    if given.n > offer.slots:
        raise ValueError(f"n={given.n}: there are {offer.slots} slots, and choices of one prompt decode together.")
    _sampling(given, given.n)
    (stops,) = check_stops(cfg.eos_ids if given.stop_ids is None else given.stop_ids, cfg.vocab_size, 1)
    if len(set(stops)) > STOPS:
        raise ValueError(f"stop_ids has {len(set(stops))} ids; a slot takes {STOPS} at most.")
    top = given.top_logprobs
    if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= MAX_TOP_LOGPROBS:
        raise ValueError(f"top_logprobs={top!r}: must be an integer of 0 to {MAX_TOP_LOGPROBS}.")
    if given.logit_bias:
        check_ids("logit_bias", list(given.logit_bias), cfg.vocab_size)
    for i, value in given.logit_bias.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"logit_bias of id {i} is {value!r}: must be a finite number.")
    if given.grammar is not None and not callable(given.grammar):
        raise ValueError(f"grammar={shown(given.grammar)}: must be a function that makes a choice's grammar.")
    check_drafts(cfg, given.use_mtp, 1)
    if given.use_mtp and not offer.depth:
        raise ValueError("use_mtp=True, but this batcher was made without drafts (use_mtp=False).")
    _check_pictures(prompt, given.pictures, offer.sight)
    if given.routing and not offer.routing:
        raise ValueError("routing=True, but this batcher records no experts (routing=False).")


def _check_pictures(prompt: list[int], pictures, sight: Sight | None) -> None:
    if sight is None:
        if len(pictures):
            raise ValueError(f"{len(pictures)} pictures are given, and this model is shown none.")
        return
    for picture in pictures:
        if np.shape(picture) != sight.shape:
            raise ValueError(f"a picture has shape {np.shape(picture)}; this model's have {sight.shape}.")
    if (places := prompt.count(sight.image_id)) != sight.tokens * len(pictures):
        raise ValueError(
            f"the prompt has {places} tokens of pictures, its {len(pictures)} pictures have {sight.tokens} each."
        )
    if prompt[-1] == sight.image_id:
        raise ValueError("the prompt ends in a picture: end it with words.")


def choices_of(number: int, request: Request, cfg, now: float) -> list[Choice]:
    """Of a request that was checked."""
    prompt = check_ids("prompt", request.prompt, cfg.vocab_size)
    stops = sorted(set(cfg.eos_ids if request.stop_ids is None else request.stop_ids))
    seeds = _sampling(request, request.n).seed.tolist()
    scored = request.prompt_logprobs
    return [Choice(number, i, request, prompt, stops, seed, now, scored=scored) for i, seed in enumerate(seeds)]


def row_of(choice: Choice, offer: Offer) -> Row:
    given, known, vocab = choice.given, len(choice.prompt), offer.cfg.vocab_size
    tokens_S, stop_N = np.zeros(offer.length + offer.depth, np.int32), np.full(STOPS, -1, np.int32)
    tokens_S[:known] = choice.prompt
    stop_N[: len(choice.stops)] = choice.stops
    bias_V = np.zeros(vocab, np.float32)
    bias_V[list(given.logit_bias)] = list(given.logit_bias.values())
    # What a grammar makes of a draft is not known when it is drawn.
    drafts = offer.depth if given.use_mtp and given.grammar is None else 0
    sampling = {name: values[0] for name, values in vars(_sampling(given, 1)).items()}
    return Row(
        tokens=tokens_S,
        known=np.int32(known),
        limit=np.int32(known + given.max_new_tokens),
        drafts=np.int32(drafts),
        stop=stop_N,
        bias=bias_V,
        sampling=Sampling(**sampling | {"seed": np.uint32(choice.seed)}),
    )


def _sampling(given: Request, rows: int) -> Sampling:
    return make_sampling(rows, given.temperature, given.top_k, given.top_p, given.min_p, given.seed)
