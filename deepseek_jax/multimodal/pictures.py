"""Picture files to numbers and back, as DeepSeek's own processor does it. Needs Pillow, the extra ``multimodal``."""

import os
import tempfile
from pathlib import Path

import numpy as np

# Of the channels, and the colour of the bars beside a picture that is no square: their mean, as a byte.
MEAN = STD = 0.5
GREY = int(MEAN * 255)
# No side becomes shorter, however long the other is.
SHORTEST = 14
EXTRA = 'pictures need Pillow: pip install "deepseek-jax[multimodal]"'


def pillow():
    """The module PIL.Image. Raises ValueError without Pillow."""
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(EXTRA) from None
    return Image


def read_picture(path: str | Path):
    """A file's picture, in RGB. Raises ValueError for what Pillow does not read, OSError where there is no file."""
    Image = pillow()
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that Pillow reads: {error}.") from None


def shown(picture, side: int) -> np.ndarray:
    """float32 [side, side, 3], values from -1 to 1: a picture, resized so that its longer side fits, between grey bars.

    Sizes are cut, not rounded, to whole pixels.
    """
    Image = pillow()
    longest = max(picture.size)
    width, height = (max(int(n / longest * side), SHORTEST) for n in picture.size)
    picture = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), (GREY,) * 3)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return (np.asarray(square, np.float32) / 255 - MEAN) / STD


def pixels(image) -> np.ndarray:
    """uint8 of values from -1 to 1: (x + 1) / 2 x 255, cut to a byte."""
    return np.clip((np.asarray(image, np.float32) + 1) / 2 * 255, 0, 255).astype(np.uint8)


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes uint8 [height, width, 3], whole or not at all."""
    picture = pillow().fromarray(image)
    descriptor, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            picture.save(file, format="PNG")
        Path(part).chmod(0o644)
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
