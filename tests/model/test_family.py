"""The family's other architectures against transformers, by V3's checks over a table of tiny configs.

Activations layer by layer, experts, logits, gradients of every tensor, and decoding with the cache.
"""

import pytest
from architectures import ARCHITECTURES
from reference import pair
from test_cache import check_decoding, check_greedy
from test_gradients import check_gradients
from test_parity import check_forward


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_equals_transformers(name):
    check_forward(pair(ARCHITECTURES[name]), name)


# What is in these is in others too: key heads in groups, one biased, and V2's attention with its router.
NEAR = ("distill-qwen, tied, yarn", "deepseek-llm", "v2-lite")
SLOWLY = [pytest.param(name, marks=pytest.mark.slow) if name in NEAR else name for name in ARCHITECTURES]


@pytest.mark.parametrize("name", SLOWLY)
def test_gradients_of_every_parameter_equal_torch(name):
    check_gradients(pair(ARCHITECTURES[name]), name)


@pytest.mark.parametrize("name", SLOWLY)
def test_cached_decoding_equals_the_full_forward_and_transformers(name):
    check_decoding(pair(ARCHITECTURES[name]), name)
    check_greedy(pair(ARCHITECTURES[name]))
