"""The demo's last part: a small Janus draws a picture, and says what it sees. Loads no JAX before it is asked to."""

from pathlib import Path

import numpy as np

CAPTION, QUESTION = "two red circles at the top left", "what is it ?"
# The papers' 5 is too strong for a model so small (paper_notes/janus_shapes.md).
WEIGHT = 2.0
# Of pixels, from -1 to 1, by their letters. What lies nearer to grey than to any is a dot.
COLOURS = {
    "·": (0, 0, 0),
    "r": (0.9, -0.8, -0.8),
    "g": (-0.8, 0.6, -0.8),
    "b": (-0.7, -0.6, 0.9),
    "y": (0.9, 0.8, -0.8),
}


def draw_and_read(folder: Path) -> dict[str, str]:
    """What the Janus of ``folder`` draws of `CAPTION`, in letters, and what it says of that."""
    import deepseek_jax as dsj
    from deepseek_jax.multimodal.draw import draw_pictures
    from deepseek_jax.multimodal.prompts import PromptWriter

    model, words = dsj.load_pretrained(folder, dtype="float32"), dsj.load_tokenizer(folder)
    writer = PromptWriter(words, model.cfg)
    image = draw_pictures(model, [writer.to_draw(CAPTION)], writer.pad_id, weight=WEIGHT).images[0]
    seen = (image.astype(np.float32) / 255 - 0.5) / 0.5
    tokens, _ = dsj.generate(model, [writer.about_pictures(QUESTION, 1)], images=[[seen]], max_new_tokens=16)
    said = words.decode(tokens[0], skip_special_tokens=True)
    return {"asked": CAPTION, "picture": in_letters(seen), "said": said.strip()}


def in_letters(image: np.ndarray) -> str:
    """A picture [height, width, 3] of values from -1 to 1. A line is two rows: letters are as high as two are wide."""
    pairs = image[: len(image) // 2 * 2].reshape(-1, 2, *image.shape[1:]).mean(1)
    nearest = np.abs(pairs[:, :, None] - np.array(list(COLOURS.values()))).sum(-1).argmin(-1)
    letters = np.array(list(COLOURS))
    return "\n".join("".join(row) for row in letters[nearest])
