"""What a form of attention costs, by the class of its config: parameters, cache and products; and a residual of several
streams. A form is added here.

All are exact integers of one layer. Products are multiply-adds of one token with one key, softmax's two matrices.
"""

from functools import singledispatch

from deepseek_jax.configs.schema import GQA, MLA, HyperConnections


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
def cache_values(a, heads: int | None = None) -> int:
    """Numbers that a token leaves in a layer's cache; or with so many key ``heads`` of the same sizes instead."""
    raise TypeError(f"there are no counts for {type(a).__name__}.")


@cache_values.register
def _(a: MLA, heads: int | None = None) -> int:
    return a.cache_width if heads is None else heads * (a.nope_dim + a.v_dim)


@cache_values.register
def _(a: GQA, heads: int | None = None) -> int:
    return 2 * (a.n_kv_heads if heads is None else heads) * a.head_dim


@singledispatch
def products(a, cached: bool = False) -> int:
    """Multiply-adds of a token with one key, scores and values; ``cached``: while decoding from the cache."""
    raise TypeError(f"there are no counts for {type(a).__name__}.")


@products.register
def _(a: MLA, cached: bool = False) -> int:
    # Decoding runs on the latents (V2 §2.1.2): the absorbed form.
    return a.n_heads * (2 * a.kv_rank + a.rope_dim if cached else a.nope_dim + a.rope_dim + a.v_dim)


@products.register
def _(a: GQA, cached: bool = False) -> int:
    return a.n_heads * 2 * a.head_dim


@singledispatch
def attended(a, length: int) -> int:
    """How many of ``length`` keys a token multiplies with at most."""
    return length


@attended.register
def _(a: MLA, length: int) -> int:
    return length if a.indexer is None else min(length, a.indexer.index_top_k)


@singledispatch
def scored(a) -> int:
    """Multiply-adds of a token with each earlier key by which an indexer chooses."""
    return 0


@scored.register
def _(a: MLA) -> int:
    return 0 if a.indexer is None else a.indexer.index_heads * (a.indexer.index_dim + 1)
