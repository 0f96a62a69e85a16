"""Gradients of every tensor of a Janus against torch autograd: of text about pictures, of pictures to draw, of a VQ."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from measured import measured
from tiny_janus import batch, pictures, tiny_janus
from torch.nn import functional

from deepseek_jax.convert.held import tensor_of
from deepseek_jax.core.params import map_variables
from deepseek_jax.core.partition import combine, partition
from deepseek_jax.multimodal.checkpoint import save_pretrained
from deepseek_jax.multimodal.names import layout
from deepseek_jax.multimodal.objective import COMMITMENT, picture_nats, text_nats, vq_loss
from deepseek_jax.multimodal.reference import reference_model

BOUND = 1e-4
# Whose gradients are rounding on both sides: a key's bias does not move a softmax, nor does that of a channel of which
# norms of this channel alone see all that follows, as in a picture's last blocks, of 32 channels for 32 groups.
NOTHING = re.compile(r".*(k_proj|\.k|down\.0\.block\.0\.conv1|decoder\.up\.1\..*(conv1|conv2|nin_shortcut))\.bias")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("janus") / "tiny"
    save_pretrained(tiny_janus(), folder, model_type="multi_modality")
    return reference_model(folder)


def transformers_names(gradients) -> dict[str, np.ndarray]:
    """Of a tree of gradients, in which None stands where there is none, the tensors by the reference's names."""
    values = {}
    map_variables(lambda path, v: values.setdefault(path, v.get_value()), gradients)
    kept, leaves = layout(replace(tiny_janus().cfg, model_type="janus"))
    found = {}
    for one in kept:
        if one.parts[0].path in values:
            (part,) = one.parts
            found[one.name] = tensor_of(values[part.path], leaves[part.path], part, None).reshape(one.shape)
    return found


def ours(objective, reached) -> dict[str, np.ndarray]:
    """Gradients of ``objective(model)`` for what ``reached`` says of a dotted path."""
    params, rest = partition(tiny_janus(), reached)
    return transformers_names(jax.jit(jax.grad(lambda params: objective(combine(params, rest))))(params))


def theirs(reference, loss) -> dict[str, np.ndarray]:
    reference.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.numpy() for name, p in reference.named_parameters() if p.grad is not None}


def check(mine: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert mine.keys() == other.keys()
    largest = max(np.linalg.norm(g) for g in other.values())
    for name, expected in other.items():
        error, norm = np.linalg.norm(mine[name] - expected), np.linalg.norm(expected)
        if NOTHING.fullmatch(name):
            assert max(norm, error) <= 1e-5 * largest, name
            continue
        assert norm > 1e-5 * largest, name
        assert error <= BOUND * norm, (name, error / norm)
        measured("janus", "gradients", error / norm)


def long(tokens) -> torch.Tensor:
    return torch.tensor(np.asarray(tokens), dtype=torch.long)


def channels_first(images) -> torch.Tensor:
    return torch.tensor(np.moveaxis(np.asarray(images), -1, 1).copy())


@pytest.mark.slow
def test_text_about_pictures(reference):
    """Tower, aligner, language model."""
    rows, _ = batch()
    logits = reference(input_ids=long(rows.tokens), pixel_values=channels_first(rows.images)).logits[:, :-1]
    nats = functional.cross_entropy(logits.flatten(0, 1), long(rows.tokens[:, 1:]).flatten(), reduction="none")
    loss = (nats * torch.tensor(rows.weight[:, 1:]).flatten()).sum()
    parts = ("vision.", "aligner.", "language.")
    check(ours(lambda m: text_nats(m, rows)[0], lambda path: path.startswith(parts)), theirs(reference, loss))


@pytest.mark.slow
def test_pictures_to_draw(reference):
    """Codes' embeddings and their aligner, the head, the language model; a row is padded in front."""
    _, rows = batch()
    S, janus = rows.codes.shape[1], reference.model
    words = janus.get_input_embeddings()(long(rows.tokens))
    embedded = torch.cat([words, reference.prepare_embeddings_for_image_generation(long(rows.codes[:, :-1]))], 1)
    mask = np.concatenate([rows.segments, np.ones((len(rows.codes), S - 1), np.int32)], 1)
    position = np.maximum(np.cumsum(mask, -1) - 1, 0)
    hidden = janus.language_model(
        inputs_embeds=embedded, attention_mask=torch.tensor(mask), position_ids=long(position)
    ).last_hidden_state
    logits = janus.generation_head(hidden[:, -S:])
    loss = functional.cross_entropy(logits.flatten(0, 1), long(rows.codes).flatten(), reduction="sum")
    parts = ("gen_embed", "gen_aligner.", "gen_head.", "language.")
    # The head of words has no part in it.
    reached = lambda path: path.startswith(parts) and path != "language.head"  # noqa: E731
    check(ours(lambda m: picture_nats(m, rows)[0], reached), theirs(reference, loss))


@pytest.mark.slow
def test_a_vq(reference):
    """Its loss on the reference's modules, vectors and codes divided by their lengths as DeepSeek's code does."""
    vq, images = reference.model.vqmodel, pictures(3, seed=9)
    codes = long(jax.jit(lambda vq, x: vq.encode(x))(tiny_janus().vq, images))
    x = channels_first(images)
    z = functional.normalize(vq.quant_conv(vq.encoder(x)), dim=1)
    code = vq.quantize.get_codebook_entry(codes)
    drawn = vq.decoder(vq.post_quant_conv(z + (code - z).detach()))
    loss = ((drawn - x) ** 2).mean() + ((code - z.detach()) ** 2).mean()
    loss = loss + COMMITMENT * ((code.detach() - z) ** 2).mean()
    check(ours(lambda m: vq_loss(m.vq, images), lambda path: path.startswith("vq.")), theirs(reference, loss))
