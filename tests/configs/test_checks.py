"""Values of the wrong type are refused in sentences, in `Context` and `Recipe` as in the model's config."""

import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as dsj
from deepseek_jax.core import context
from deepseek_jax.train.recipe import LearningRate, Optimizer, Recipe
from deepseek_jax.train.weights import LossWeights

NAN = float("nan")
WRONG = [
    (LossWeights, "mtp", "0.3", "a number, not '0.3'"),
    (LossWeights, "balance", NAN, "a number, not nan"),
    (LossWeights, "devices", 2.0, "an integer or None, not 2.0"),
    (LearningRate, "peak", True, "a number, not True"),
    (LearningRate, "warmup_steps", 1.5, "an integer, not 1.5"),
    (LearningRate, "drops", ((1.5, 2.0),), r"a tuple, each element a tuple of an integer and a number, not \(\(1.5"),
    (LearningRate, "drops", ((1, 2.0, 3),), "a tuple, each element a tuple of an integer and a number, not "),
    (Optimizer, "muon", 1, "True or False, not 1"),
    (Optimizer, "clip", NAN, "a number, not nan"),
    (Optimizer, "moments", None, "text, not None"),
    (Recipe, "tokens", 1e9, "an integer, not 1000000000.0"),
    (Recipe, "first_rows", "8", "an integer or None, not '8'"),
    (Recipe, "rate", 1e-3, "a LearningRate, not 0.001"),
    (Recipe, "model", "x" * 10, None),
    (Recipe, "model", 3, "text, not 3"),
]
for _context in (dsj.Context, context.Context):
    WRONG += [
        (_context, "experts", 3, "text, not 3"),
        (_context, "remat", ["none"], r"text, not \['none'\]"),
        (_context, "drop", 1, "True or False, not 1"),
        (_context, "expert_chunks", True, "an integer, not True"),
        (_context, "expert_chunks", 2.0, "an integer, not 2.0"),
        (_context, "expert_buffer", NAN, "a number, not nan"),
        (_context, "loss_chunk", "8", "an integer or None, not '8'"),
        (_context, "loss_chunk", np.int64(8), None),
        (_context, "mesh", "expert=2", "a Mesh or a AbstractMesh or None, not 'expert=2'"),
        (_context, "dtype", jnp.bfloat16, None),
        (_context, "dtype", "float32", None),
    ]


@pytest.mark.parametrize(("kind", "field", "value", "message"), WRONG)
def test_a_value_of_the_wrong_type_is_refused(kind, field, value, message):
    if message is None:
        assert getattr(kind(**{field: value}), field) == value
        return
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {field} must be {message}"):
        kind(**{field: value})


@pytest.mark.parametrize("dtype", [jnp.int32, "float33", 3, object()])
def test_a_compute_dtype_is_a_floating_one(dtype):
    with pytest.raises(ValueError, match=r"Context\(dtype=.*must be a floating dtype, or None"):
        dsj.Context(dtype=dtype)


def test_infinity_switches_clipping_off():
    assert Optimizer(clip=np.float32("inf")) == Optimizer(clip=float("inf"))
