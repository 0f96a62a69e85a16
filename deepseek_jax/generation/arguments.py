"""What `generate`, `stream` and `score` are given, checked before anything runs."""

from operator import index

import jax
import numpy as np

from deepseek_jax.core.context import Context
from deepseek_jax.model.arguments import check_context
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.notes import shown

ENCODE = "dsj.load_tokenizer(FOLDER).encode makes ids of text."


def check_model(model, ctx: Context | None) -> Context:
    """The context, by default that of one device.

    Raises ValueError for what is no model or context, and for a model on several devices without a context that says
    so.
    """
    if not isinstance(model, Transformer):
        raise ValueError(f"the model must be one that dsj.init or dsj.load_pretrained gave, not {shown(model)}.")
    place = getattr(jax.tree.leaves(model)[0], "sharding", None)
    devices = 1 if place is None else len(place.device_set)
    ctx = check_context(ctx)
    if devices > 1 and ctx.mesh is None:
        raise ValueError(f"the model lies on {devices} devices: give ctx=dsj.Context(mesh=...), with its mesh.")
    return ctx


def check_prompts(prompts, vocab_size: int) -> list[list[int]]:
    if isinstance(prompts, str) or not hasattr(prompts, "__iter__"):
        raise ValueError(f"prompts is {shown(prompts)}: it must be a list of lists of token ids. {ENCODE}")
    rows = list(prompts)
    if not rows:
        raise ValueError("there is no prompt: give a list with at least one list of token ids.")
    return [check_ids(f"prompt {row}", prompt, vocab_size) for row, prompt in enumerate(rows)]


def check_ids(name: str, ids, vocab_size: int) -> list[int]:
    """Token ids as a list. Raises ValueError for anything else, none at all, and ids outside the vocabulary."""
    if isinstance(ids, str) or not hasattr(ids, "__len__") or (hasattr(ids, "ndim") and ids.ndim != 1):
        raise ValueError(f"{name} is {shown(ids)}, not a list of token ids. {ENCODE}")
    if len(ids) == 0:
        raise ValueError(f"{name} is empty: give at least one token, such as the model's bos.")
    return [_check_id(name, i, vocab_size) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]


def check_stops(stop_ids, vocab_size: int, rows: int) -> list[list[int]]:
    """The ids of each row, of ids for all or a list of ids for each."""
    ids = list(stop_ids) if hasattr(stop_ids, "__iter__") else [stop_ids]
    if not any(hasattr(i, "__iter__") and not isinstance(i, str) for i in ids):
        ids = [ids] * rows
    elif len(ids) != rows:
        raise ValueError(f"stop_ids has {len(ids)} lists; give ids for all, or a list of ids for each of {rows} rows.")
    return [[_check_id("stop_ids", i, vocab_size) for i in _each("stop_ids", row)] for row in ids]


def _each(name: str, ids) -> list:
    if isinstance(ids, str) or not hasattr(ids, "__iter__"):
        raise ValueError(f"{name} holds {shown(ids)} beside lists: give ids for all rows, or a list of ids for each.")
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)


def _check_id(where: str, i, vocab_size: int) -> int:
    try:
        found = None if isinstance(i, bool) else index(i)
    except TypeError:
        found = None
    if found is None:
        raise ValueError(f"{where} holds {shown(i)}: token ids must be integers.")
    if not 0 <= found < vocab_size:
        raise ValueError(f"{where} holds id {found}, outside the vocabulary of {vocab_size}.")
    return found


def check_count(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}={value!r}: must be an integer of at least 1.")


def check_counts(name: str, value, rows: int) -> np.ndarray:
    """int64 [rows], of one count or one for each row."""
    each = list(value) if hasattr(value, "__iter__") and not isinstance(value, str) else [value] * rows
    if len(each) != rows:
        raise ValueError(f"{name} has {len(each)} values; give one, or one for each of {rows} rows.")
    for one in each:
        check_count(name, one)
    return np.asarray([min(one, 1 << 40) for one in each])


def check_drafts(cfg, use_mtp, rows: int) -> np.ndarray:
    """int32 [rows]: the MTP modules that draft for each row, 0 or all, of one bool or one for each row.

    Raises ValueError where there are none to use.
    """
    try:
        use = np.broadcast_to(np.asarray(use_mtp, bool), (rows,))
    except ValueError:
        raise ValueError(f"use_mtp={use_mtp!r}: give one bool, or one for each of {rows} rows.") from None
    if use.any() and not cfg.mtp_depth:
        raise ValueError(f"use_mtp=True, but {cfg.name} has no MTP modules (mtp_depth=0).")
    return np.where(use, cfg.mtp_depth, 0).astype(np.int32)


def check_records(cfg, record, known: tuple[str, ...]) -> tuple[str, ...]:
    """What a generation is to record. Raises ValueError for what there is not, and for routing without experts."""
    names = (record,) if isinstance(record, str) else tuple(record)
    for name in names:
        if name not in known:
            raise ValueError(f"record holds {name!r}: choose among {', '.join(known)}.")
    if "routing" in names and cfg.moe is None:
        raise ValueError(f"record holds 'routing', but {cfg.name} has no experts.")
    return names


def check_length(cfg, longest: int, new: int, cache_length: int | None = None) -> None:
    """Raises ValueError for more tokens than the model, or the cache where its length is given, has room for."""
    longest, new = int(longest), int(new)
    needed = longest + new
    if needed > cfg.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones make {needed}, beyond the {cfg.max_length} of "
            f"{cfg.name}; shorten the prompt or lower max_new_tokens."
        )
    if cache_length is None:
        return
    check_count("cache_length", cache_length)
    if needed > cache_length:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones make {needed}, beyond cache_length={cache_length}."
        )
