"""The DeepSeek model family in JAX and Flax.

The public API is the list below; each name is imported on first use, so that the command line
can answer ``--help`` without loading JAX.
"""

import importlib
from typing import TYPE_CHECKING

from deepseek_jax.version import __version__

_HOME = {
    "zoo": "deepseek_jax.configs.zoo",
    "Context": "deepseek_jax.parallel.context",
    "init": "deepseek_jax.multimodal.public",
    "partition": "deepseek_jax.core.partition",
    "combine": "deepseek_jax.core.partition",
    "load_pretrained": "deepseek_jax.multimodal.public",
    "save_pretrained": "deepseek_jax.multimodal.public",
    "loss": "deepseek_jax.train.loss",
    "LossWeights": "deepseek_jax.train.weights",
    "update_router_bias": "deepseek_jax.train.balance",
    "generate": "deepseek_jax.multimodal.public",
    "load_tokenizer": "deepseek_jax.text.tokenizer",
    "counts": "deepseek_jax.analysis.counts",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'deepseek_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return sorted(__all__)


if TYPE_CHECKING:
    from deepseek_jax.analysis.counts import counts  # noqa: F401
    from deepseek_jax.configs.zoo import zoo  # noqa: F401
    from deepseek_jax.core.partition import combine, partition  # noqa: F401
    from deepseek_jax.multimodal.public import generate, init, load_pretrained, save_pretrained  # noqa: F401
    from deepseek_jax.parallel.context import Context  # noqa: F401
    from deepseek_jax.text.tokenizer import load_tokenizer  # noqa: F401
    from deepseek_jax.train.balance import update_router_bias  # noqa: F401
    from deepseek_jax.train.loss import loss  # noqa: F401
    from deepseek_jax.train.weights import LossWeights  # noqa: F401
