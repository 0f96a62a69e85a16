"""PyTorch transformers' own continuous batching, on the same weights and requests.

Its paged cache has heads of one size, keys' and values' alike, so it does not take MLA: both sides run a dense Qwen2,
as the distilled releases are.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deepseek_jax.configs.schema import GQA, ModelConfig
from deepseek_jax.generation.request import Request

PAGE = 64  # tokens
DISTILL = ModelConfig(
    name="bench-serve-distill",
    vocab_size=2048,
    dim=256,
    n_layers=5,
    n_dense_layers=5,
    ffn_dim=704,
    attention=GQA(n_heads=4, n_kv_heads=2, head_dim=64, bias=True),
    moe=None,
    max_length=2048,
    init_std=0.02,
    model_type="qwen2",
)


@contextmanager
def batching(folder: str, requests: list[Request], slots: int, chunk: int, length: int) -> Iterator[Callable]:
    """As `run.slots`, in float32 on all cores. ``slots``: requests that it decodes together; prompts are fed in what a
    batch has left of ``slots + chunk`` tokens; nothing is kept from round to round."""
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sizes = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=2 * slots * -(-length // PAGE),
        max_batch_tokens=slots + chunk,
        max_requests_per_batch=slots,
        allow_block_sharing=False,
    )
    manager = model.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=-1), sizes)
    manager.start()

    def run():
        begin, found = time.perf_counter(), {}
        ids = [
            manager.add_request(list(r.prompt), max_new_tokens=r.max_new_tokens, record_timestamps=True)
            for r in requests
        ]
        while len(found) < len(ids):
            one = manager.get_result(timeout=60)
            if one is None or one.error:
                raise RuntimeError(f"transformers' continuous batching failed: {one and one.error}")
            if one.is_finished():
                found[one.request_id] = one
        seconds = time.perf_counter() - begin
        texts = [found[i].generated_tokens for i in ids]
        return texts, [found[i].timestamps[0] - begin for i in ids], seconds

    try:
        yield run
    finally:
        manager.stop(block=True, timeout=60)
        manager.destroy()
