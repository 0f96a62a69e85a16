"""Exact counts of a Janus from its config alone: what stands around the language model, which `counts.py` counts."""

from itertools import pairwise

from deepseek_jax.configs.multimodal import VQ, JanusConfig

COLOURS = 3


def components(cfg: JanusConfig) -> dict[str, int]:
    """component -> parameters, biases and norms included, of everything but the language model."""
    dim, vision, vq = cfg.language.dim, cfg.vision, cfg.vq
    hidden = (cfg.depth - 1) * _linear(dim, dim)
    layer = 4 * _linear(vision.dim, vision.dim) + 4 * vision.dim
    layer += _linear(vision.dim, vision.ffn_dim) + _linear(vision.ffn_dim, vision.dim)
    patches = _linear(COLOURS * vision.patch**2, vision.dim) + vision.n_tokens * vision.dim
    return {
        "vision": patches + vision.n_layers * layer + 2 * vision.dim,
        "aligner": _linear(vision.dim, dim) + hidden,
        "vq_encoder": _encoder(vq) + _linear(vq.z_dim, vq.code_dim),
        "vq_decoder": _decoder(vq) + _linear(vq.code_dim, vq.z_dim),
        "codebook": vq.n_codes * vq.code_dim,
        "gen_embed": vq.n_codes * vq.code_dim,
        "gen_aligner": _linear(vq.code_dim, dim) + hidden,
        "gen_head": _linear(dim, cfg.head_dim) + _linear(cfg.head_dim, vq.n_codes),
    }


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _conv(inputs: int, outputs: int) -> int:
    return _linear(9 * inputs, outputs)


def _block(inputs: int, outputs: int) -> int:
    """A residual block: two norms, two convolutions, a map of its own where the width changes."""
    shortcut = _linear(inputs, outputs) if inputs != outputs else 0
    return 2 * inputs + _conv(inputs, outputs) + 2 * outputs + _conv(outputs, outputs) + shortcut


def _attention(width: int) -> int:
    return 2 * width + 4 * _linear(width, width)


def _blocks(widths: list[int]) -> int:
    return sum(_block(a, b) for a, b in pairwise(widths))


def _encoder(vq: VQ) -> int:
    widths = [vq.channels * m for m in vq.multipliers]
    last, total = widths[-1], _conv(COLOURS, vq.channels)
    for before, width in zip([vq.channels, *widths], widths, strict=False):
        total += _blocks([before, *[width] * vq.n_blocks])
    total += sum(_conv(width, width) for width in widths[:-1]) + vq.n_blocks * _attention(last)
    return total + _blocks([last] * 3) + _attention(last) + 2 * last + _conv(last, vq.z_dim)


def _decoder(vq: VQ) -> int:
    widths = [vq.channels * m for m in reversed(vq.multipliers)]
    first, last, total = widths[0], widths[-1], _conv(vq.z_dim, widths[0])
    for before, width in zip([first, *widths], widths, strict=False):
        total += _blocks([before, *[width] * (vq.n_blocks + 1)])
    total += sum(_conv(width, width) for width in widths[:-1]) + (vq.n_blocks + 1) * _attention(first)
    return total + _blocks([first] * 3) + _attention(first) + 2 * last + _conv(last, COLOURS)
