"""Other names of the published tensors, as tools write them, read as the published ones.

Three kinds: the whole model under another prefix than ``model.`` (none, a wrapper's ``model.model.``, a part of a
larger model's ``language_model.model.``); V4's as transformers 5 writes them, half its own; and a layer's experts in
one tensor, as transformers 5 has them in memory and writes them with ``save_pretrained(save_original_format=False)``:
``mlp.experts.gate_up_proj`` [E, 2 F, D], gate first, and ``mlp.experts.down_proj`` [E, D, F]. An expert's published
matrix is a run of bytes of these, so that it has an entry of its own and everything reads it as if it had been stored
alone.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from deepseek_jax.convert.safetensors import CheckpointError, Entry
from deepseek_jax.convert.tables import HALVES
from deepseek_jax.notes import cut, shown

TRUNK, HEAD, EMBEDDING = "model.", "lm_head.", "embed_tokens.weight"
FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up|down)_proj(_scale_inv)?")
LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.|mtp\.(\d+)\.")
# What V4's names are when transformers has written them, beside the prefix.
V4_SAVED = {
    "model.embed_tokens.weight": "embed.weight",
    **{f"model.hc_head.hc_{part}": f"hc_head_{part}" for part in ("fn", "base", "scale")},
}


@dataclass(frozen=True)
class Prefix:
    """What stands before the names of the trunk in place of ``model.``, and before ``lm_head.``."""

    trunk: str = TRUNK
    head: str = ""

    @property
    def said(self) -> str | None:
        """What a note says of these names; None of the published ones."""
        return None if self == Prefix() else f"the names begin with {shown(self.trunk)}: read as if with 'model.'."

    def published(self, name: str) -> str:
        if self.trunk == TRUNK:
            return name
        if name.startswith(self.head + HEAD):
            return name.removeprefix(self.head)
        return TRUNK + name.removeprefix(self.trunk) if name.startswith(self.trunk) else name


class V4Saved:
    """V4's names of transformers' own: ``model.`` before the published ones, and a norm's without what it is of."""

    said = "the names are those that transformers gives V4: read as the released ones."

    def published(self, name: str) -> str:
        name = V4_SAVED.get(name) or name.removeprefix(TRUNK)
        return re.sub(r"(layers\.\d+\.attn\.)norm\.", r"\1kv_norm.", name)


def find_prefix(names: Collection[str]) -> Prefix | V4Saved:
    """How a checkpoint's names differ from the published ones: by a prefix that the embedding's tells, or as
    transformers has V4's; not at all where that is not clear."""
    if set(V4_SAVED) <= set(names):
        return V4Saved()
    found = {name.removesuffix(EMBEDDING) for name in names if name == EMBEDDING or name.endswith("." + EMBEDDING)}
    found = {trunk for trunk in found if not re.search(r"(^|\.)layers\.\d+\.$", trunk)}
    if TRUNK in found or len(found) != 1:
        return Prefix()
    trunk = found.pop()
    return Prefix(trunk, trunk.removesuffix(TRUNK) if trunk.endswith("." + TRUNK) else "")


def layer_of(name: str, n_layers: int) -> int | None:
    """The layer that a published name belongs to; MTP modules are those after the last of ``n_layers``."""
    found = LAYER.match(name)
    if found is None:
        return None
    return n_layers + int(found[2]) if found[1] is None else int(found[1])


def published_entries(entries: dict[str, Entry], prefix: Prefix | V4Saved, block: tuple[int, int]) -> dict[str, Entry]:
    """The entries under their published names, each expert's matrices apart.

    Raises CheckpointError where two names become one, and where a block of scales spans gate and up.
    """
    found: dict[str, Entry] = {}
    for entry in entries.values():
        name = prefix.published(entry.name)
        for one in _experts(replace(entry, name=name), block) or [replace(entry, name=name)]:
            if one.name in found:
                raise CheckpointError(
                    f"{entry.file}: {cut(entry.name)} is read as {cut(one.name)}, which is there as well."
                )
            found[one.name] = one
    return found


def fused_names(names: Iterable[str]) -> list[str]:
    return [name for name in names if FUSED.fullmatch(name)]


def _experts(entry: Entry, block: tuple[int, int]) -> list[Entry]:
    """The published matrices, or their scales, in a layer's fused experts; none for another tensor."""
    fused = FUSED.fullmatch(entry.name)
    if not fused or len(entry.shape) != 3:
        return []
    module, kind, scale = fused[1], fused[2], fused[3] or ""
    parts = HALVES if kind == "gate_up" else ("down",)
    experts, rows, columns = entry.shape
    if rows % len(parts):
        what = f"blocks of {block[0]} rows span gate and up" if scale else "gate and up would differ in size"
        raise CheckpointError(f"{entry.file}: {cut(entry.name)} has {rows} rows for each expert: {what}.")
    rows, size = rows // len(parts), entry.nbytes // max(experts * len(parts), 1)
    return [
        replace(
            entry,
            name=f"{module}.{expert}.{part}_proj.weight{scale}",
            shape=(rows, columns),
            start=entry.start + size * (expert * len(parts) + number),
            stop=entry.start + size * (expert * len(parts) + number + 1),
        )
        for expert in range(experts)
        for number, part in enumerate(parts)
    ]
