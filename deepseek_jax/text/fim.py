"""A prompt whose answer is what stands between two texts: fill in the middle, in the mode PSM (V3 4.1; data.fim)."""

from deepseek_jax.text.bpe import FIM_BEGIN, FIM_END, FIM_HOLE
from deepseek_jax.text.tokenizer import Tokenizer


def fim_prompt(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """BOS where the tokenizer puts it, and the two texts behind their sentinels; the names of control tokens in them
    are text. Raises ValueError for a tokenizer that lacks a sentinel."""
    begin, hole, end = (tokenizer.id_of(mark) for mark in (FIM_BEGIN, FIM_HOLE, FIM_END))
    if None in (begin, hole, end):
        raise ValueError(f"this tokenizer has not the tokens {FIM_BEGIN}, {FIM_HOLE} and {FIM_END} for it.")
    before, after = tokenizer.encode_batch([prefix, suffix], add_bos=False, special_tokens=False)
    return [*tokenizer.encode("", special_tokens=False), begin, *before, hole, *after, end]
