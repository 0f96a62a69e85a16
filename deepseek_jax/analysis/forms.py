"""What a form of attention costs, by the class of its config: parameters, cache and products; and a residual of several
streams. A form is added here.

All are exact integers of one layer. Products are multiply-adds of one token with one key, softmax's two matrices.
"""

from dataclasses import dataclass
from functools import singledispatch

from deepseek_jax.configs.schema import GQA, MLA, Compressed, HyperConnections


@singledispatch
def parameters(a, dim: int) -> int:
    """The parameters of a layer of width ``dim``, norms and biases of its own included."""
    raise TypeError(f"there are no counts for {type(a).__name__}.")


@parameters.register
def _(a: MLA, dim: int) -> int:
    head = a.nope_dim + a.rope_dim
    queries = dim * a.n_heads * head if a.q_rank is None else dim * a.q_rank + a.q_rank + a.q_rank * a.n_heads * head
    latents = dim * (a.kv_rank + a.rope_dim) + a.kv_rank
    keys_values = a.kv_rank * a.n_heads * (a.nope_dim + a.v_dim)
    return queries + latents + keys_values + a.n_heads * a.v_dim * dim + _indexer(a, dim)


def _indexer(a: MLA, dim: int) -> int:
    """Its queries, its key with a norm's weight and bias, and the weights of its heads."""
    if a.indexer is None:
        return 0
    heads, size = a.indexer.index_heads, a.indexer.index_dim
    return a.q_rank * heads * size + (dim + 2) * size + dim * heads


@parameters.register
def _(a: GQA, dim: int) -> int:
    heads = a.n_heads + 2 * a.n_kv_heads
    return (heads + a.n_heads) * a.head_dim * dim + (heads * a.head_dim if a.bias else 0)


@parameters.register
def _(a: Compressed, dim: int) -> int:
    heads = a.n_heads * a.head_dim
    queries, key, sinks = (dim + 1 + heads) * a.q_rank, (dim + 1) * a.head_dim, a.n_heads
    output = heads * a.o_rank + a.o_groups * a.o_rank * dim
    entries = _compressor(a.head_dim, a, dim) if a.ratio else 0
    if a.sparse:
        size, index_heads = a.indexer.index_dim, a.indexer.index_heads
        entries += _compressor(size, a, dim) + (a.q_rank * size + dim) * index_heads
    return queries + key + sinks + output + entries


def _compressor(size: int, a: Compressed, dim: int) -> int:
    """Keys, gates and places of tokens, twice as wide where windows overlap, and a norm."""
    width = 2 * size if a.sparse else size
    return (2 * dim + a.ratio) * width + size


@parameters.register
def _(a: HyperConnections, dim: int) -> int:
    """Of one sublayer's: the weights of reading, writing and mixing, a bias each and three scales."""
    H = a.n_streams
    made = 2 * H + H * H
    return (H * dim * made if a.constrained else dim * (2 + H)) + made + 3


def collapse_parameters(a: HyperConnections, dim: int) -> int:
    """Of what makes one stream of several at the end: a weight each with a bias, and a scale; a sum has none."""
    H = a.n_streams
    return H * dim * H + H + 1 if a.constrained else 0


@singledispatch
def cache_values(a, length: int, heads: int | None = None) -> int:
    """Numbers that ``length`` tokens leave in a layer's cache; or with so many key ``heads`` of the same sizes
    instead."""
    raise TypeError(f"there are no counts for {type(a).__name__}.")


@cache_values.register
def _(a: MLA, length: int, heads: int | None = None) -> int:
    return length * (a.cache_width if heads is None else heads * (a.nope_dim + a.v_dim))


@cache_values.register
def _(a: GQA, length: int, heads: int | None = None) -> int:
    return length * 2 * (a.n_kv_heads if heads is None else heads) * a.head_dim


@cache_values.register
def _(a: Compressed, length: int, heads: int | None = None) -> int:
    if heads is not None:
        return length * 2 * heads * a.head_dim
    # A key, which is the value as well, of each recent token; entries; and their keys for the indexer. The tokens of an
    # entry that is not complete yet are left out, of which there are fewer than two windows.
    entry = a.head_dim + (a.indexer.index_dim if a.sparse else 0)
    return min(length, a.window) * a.head_dim + (length // a.ratio * entry if a.ratio else 0)


@dataclass(frozen=True)
class Reads:
    """Keys that a token reads: one in ``step`` earlier tokens, at most ``most`` (None: all), with ``products``
    multiply-adds each. ``chooses``: an indexer's scores, which choose what is read."""

    products: int
    step: int = 1
    most: int | None = None
    chooses: bool = False

    def after(self, length: int) -> int:
        """Multiply-adds of one more token after ``length``."""
        return self._keys(length) * self.products

    def flops(self, length: int) -> int:
        """FLOPs of a token with the keys before it, on average over ``length`` tokens, rounded down: with half of them,
        or where at most k are read with k - step k^2 / (2 length)."""
        k = self._keys(length)
        return (2 * k * length - self.step * k * k) * self.products // length

    def _keys(self, length: int) -> int:
        keys = length // self.step
        return keys if self.most is None else min(keys, self.most)


@singledispatch
def reads(a, cached: bool = False) -> tuple[Reads, ...]:
    """What a token reads, scores and values, and the scores by which an indexer chooses; ``cached``: while decoding
    from the cache."""
    raise TypeError(f"there are no counts for {type(a).__name__}.")


@reads.register
def _(a: MLA, cached: bool = False) -> tuple[Reads, ...]:
    # Decoding runs on the latents (V2 §2.1.2): the absorbed form.
    products = a.n_heads * (2 * a.kv_rank + a.rope_dim if cached else a.nope_dim + a.rope_dim + a.v_dim)
    if a.indexer is None:
        return (Reads(products),)
    return Reads(products, most=a.indexer.index_top_k), Reads(_score(a.indexer), chooses=True)


@reads.register
def _(a: GQA, cached: bool = False) -> tuple[Reads, ...]:
    return (Reads(a.n_heads * 2 * a.head_dim),)


@reads.register
def _(a: Compressed, cached: bool = False) -> tuple[Reads, ...]:
    products = a.n_heads * 2 * a.head_dim
    recent = Reads(products, most=a.window)
    if not a.ratio:
        return (recent,)
    if not a.sparse:
        return recent, Reads(products, a.ratio)
    return recent, Reads(products, a.ratio, a.indexer.index_top_k), Reads(_score(a.indexer), a.ratio, chooses=True)


def _score(indexer) -> int:
    return indexer.index_heads * (indexer.index_dim + 1)
