"""Which fields requests have, and what each may be; what is known but not done here is refused by name.

Fields that nobody knows are ignored, as OpenAI-compatible servers do; one that would change an answer never is.
"""

import logging
from collections.abc import Callable, Mapping

from deepseek_jax.notes import shown
from deepseek_jax.serving.errors import bad

LOG = logging.getLogger("deepseek_jax.serving")
MOST_STOPS, MOST_STOP_IDS, LONGEST_STOP = 16, 16, 1000
MOST_BIASES = 1024
NEUTRAL: dict[str, tuple] = {
    # OpenAI's
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": (),
    "functions": (),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "presence_penalty": (0,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": (),
    "web_search_options": (),
    # vLLM's, and those it had
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "ignore_eos": (False,),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "min_tokens": (0,),
    "mm_processor_kwargs": (),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "repetition_penalty": (1,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "top_a": (0,),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
}
# Say who asks, and change nothing.
IGNORED = {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "priority", "request_id"}
REQUEST_WIDE = {
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
}
REQUEST_WIDE |= {"stop", "stop_token_ids", "logprobs", "logit_bias"}
CHAT = REQUEST_WIDE | {"messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice"}
CHAT |= {"chat_template_kwargs", "thinking", "enable_thinking", "reasoning_effort", "routing"}
COMPLETION = REQUEST_WIDE | {"prompt", "suffix", "echo", "response_format"}


def known_fields(body, fields: set[str]) -> dict:
    """The fields of a request that are given, null left out.

    Raises `ApiError` for a body that is no object, and for a field that asks for what is not done.
    """
    if not isinstance(body, dict):
        raise bad("body", f"must be a JSON object, not {shown(body)}.")
    given = {name: value for name, value in body.items() if value is not None}
    for name in sorted(set(given) - fields):
        if name in NEUTRAL or name in CHAT | COMPLETION:
            neutral = NEUTRAL.get(name, ())
            # True is 1 for Python, and not what is meant.
            if not any(
                given[name] == value and isinstance(given[name], bool) == isinstance(value, bool) for value in neutral
            ):
                only = f", only {' or '.join(map(repr, neutral))}" if neutral else ""
                raise bad(name, f"is not supported{only}; it is {shown(given[name])}.", "unsupported_parameter")
        elif name not in IGNORED:
            LOG.info("a request's field %s is unknown and ignored", shown(name))
    return {name: value for name, value in given.items() if name in fields}


def number(name: str, value, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise bad(name, f"must be a number from {low:g} to {high:g}, not {shown(value)}.")
    return float(value)


def integer(name: str, value, low: int, high: int | None = None) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        upto = "" if high is None else f" and at most {high}"
        raise bad(name, f"must be an integer of at least {low}{upto}, not {shown(value)}.")
    return value


def boolean(name: str, value) -> bool:
    if not isinstance(value, bool):
        raise bad(name, f"must be true or false, not {shown(value)}.")
    return value


def text(name: str, value) -> str:
    if not isinstance(value, str):
        raise bad(name, f"must be text, not {shown(value)}.")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise bad(name, "holds half a surrogate pair, which is no text.")
    return value


def mapping(name: str, value) -> dict:
    if not isinstance(value, dict):
        raise bad(name, f"must be an object, not {shown(value)}.")
    return value


def one_of(name: str, value, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise bad(name, f"must be one of {', '.join(choices)}, not {shown(value)}.")
    return value


def listed(name: str, value, of: Callable, least: int = 0, most: int | None = None) -> list:
    """A list, each of whose entries ``of(name, entry)`` checks."""
    if not isinstance(value, list) or len(value) < least or (most is not None and len(value) > most):
        upto = "" if most is None else f" and at most {most}"
        raise bad(name, f"must be a list of at least {least}{upto} entries, not {shown(value)}.")
    return [of(f"{name}[{i}]", entry) for i, entry in enumerate(value)]


def stops(name: str, value) -> tuple[str, ...]:
    """Stop strings: one, or a list of them."""
    found = listed(name, [value] if isinstance(value, str) else value, text, most=MOST_STOPS)
    for stop in found:
        if not 1 <= len(stop) <= LONGEST_STOP:
            raise bad(name, f"must hold texts of 1 to {LONGEST_STOP} characters, not {shown(stop)}.")
    return tuple(found)


def biases(name: str, value, vocab_size: int) -> Mapping[int, float]:
    found = {}
    if len(mapping(name, value)) > MOST_BIASES:
        raise bad(name, f"holds {len(value)} entries; {MOST_BIASES} are the most.")
    for key, bias in value.items():
        if not key.isdecimal() or not key.isascii() or len(key) > 9 or int(key) >= vocab_size:
            raise bad(name, f"holds {shown(key)}, which is no token id below {vocab_size}.")
        found[int(key)] = number(f"{name}.{key}", bias, -100, 100)
    return found
