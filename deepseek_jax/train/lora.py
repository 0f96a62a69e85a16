"""Fresh low-rank adapters (LoRA, 2106.09685) on a model whose weights stay as they are, FP8 included.

`deepseek_jax.convert.adapter` merges them into the weights, and reads and writes them.
"""

import zlib

import jax.numpy as jnp
import numpy as np

from deepseek_jax.convert.adapter import adaptable, adapted_paths, low_rank, shapes
from deepseek_jax.core.params import map_variables, matrix_of, named_variables
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.patterns import Chosen, matches, paths
from deepseek_jax.train.tuning import LoRA


def adapt(model: Transformer, lora: LoRA, seed: int = 0, dtype=jnp.float32) -> Transformer:
    """``model`` with adapters of ``dtype`` on ``lora.targets``; its own leaves are shared, not copied.

    A is drawn from N(0, 1 / inputs), B is 0: the model computes what it did before. `partition` then trains the
    adapters alone. Of a stack some of whose layers are chosen, the others have A = B = 0: neither gradients nor weight
    decay ever move them from there.

    Raises ValueError for a target that matches no linear map, rank 0, and a model that has adapters already.
    """
    if not lora.rank:
        raise ValueError("adapters of rank 0 are none; give a rank of at least 1.")
    if adapted_paths(model):
        raise ValueError("the model has adapters already: merge them first, or load a model without.")
    chosen = check_targets(model, lora)

    def fill(name: str, shape: tuple[int, ...], lead: int, inputs: int) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        a = rng.standard_normal(shape, np.float32) * np.float32(np.prod(shape[lead : lead + inputs]) ** -0.5)
        if chosen[name] is not True:
            a[np.setdiff1d(np.arange(shape[0]), chosen[name])] = 0
        return a

    def wrap(path, variable):
        name = ".".join(map(str, path))
        if name not in chosen:
            return variable
        a_shape, b_shape, lead = shapes(variable, lora.rank)
        a = fill(name, a_shape, lead, len(matrix_of(variable).inputs))
        return low_rank(variable, a, np.zeros(b_shape), lora.alpha, dtype)

    return map_variables(wrap, model)


def check_targets(model: Transformer, lora: LoRA) -> Chosen:
    """The linear maps that ``lora.targets`` match (`patterns.matches`), of a model or its shapes. Raises ValueError
    for a target without a match."""
    weights = named_variables(model)
    return matches(model, lora.targets, {p: n for p, n in paths(model).items() if adaptable(weights[p], p)})
