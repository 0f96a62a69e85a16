"""Pictures of coloured shapes with their captions, made by numbers; and a reader of such pictures that knows no model.

A picture is 32 x 32: one to three shapes of one form and colour, around one of four corners, on grey.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

SIDE = 32
COLOURS = {"red": (0.9, -0.8, -0.8), "green": (-0.8, 0.6, -0.8), "blue": (-0.7, -0.6, 0.9), "yellow": (0.9, 0.8, -0.8)}
FORMS = ("square", "circle", "triangle")
PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
COUNTS = ("one", "two", "three")
GREY = 0.0
# Where the centres of one, two, three shapes lie in their corner of 16 x 16 pixels, before they are moved.
CENTRES = {1: ((8, 8),), 2: ((4, 4), (11, 11)), 3: ((4, 4), (4, 12), (12, 8))}
RADII = {1: 5.5, 2: 3.5, 3: 3.0}
# A pixel is a shape's where its colour is at least so far from grey, and a shape has at least so many.
FAR, FEWEST = 0.6, 6


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    count: str
    colour: str
    form: str
    place: str

    @property
    def caption(self) -> str:
        plural = "" if self.count == "one" else "s"
        return f"{self.count} {self.colour} {self.form}{plural} at the {self.place}"


SCENES = tuple(
    Scene(count, colour, form, place) for count in COUNTS for colour in COLOURS for form in FORMS for place in PLACES
)
ATTRIBUTES = ("count", "colour", "form", "place")
WORDS = tuple(sorted({word for scene in SCENES for word in scene.caption.split()}))


def picture(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """float32 [32, 32, 3], values from -1 to 1; shapes are moved and sized at random, their edges smoothed."""
    count = COUNTS.index(scene.count) + 1
    fine = 4  # samples a pixel and axis
    grid = (np.arange(SIDE * fine) + 0.5) / fine
    y, x = np.meshgrid(grid, grid, indexing="ij")
    top, left = (16 * half for half in PLACES[scene.place])
    shift = rng.uniform(-1, 1, 2)
    covered = np.zeros_like(y, bool)
    for centre in CENTRES[count]:
        cy, cx = centre[0] + top + shift[0], centre[1] + left + shift[1]
        radius = RADII[count] * rng.uniform(0.9, 1.05)
        covered |= inside(scene.form, y - cy, x - cx, radius)
    share = covered.reshape(SIDE, fine, SIDE, fine).mean((1, 3))[..., None]
    return (GREY + share * (np.asarray(COLOURS[scene.colour]) - GREY)).astype(np.float32)


def inside(form: str, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """Whether points are in a form around 0."""
    if form == "square":
        return np.maximum(abs(y), abs(x)) <= 0.85 * radius
    if form == "circle":
        return y**2 + x**2 <= radius**2
    return (y <= 0.9 * radius) & (abs(x) <= (y + radius) * 0.55)


def drawn_set(count: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """Scenes in a random order, each as often as the others, and their pictures [count, 32, 32, 3]."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(SCENES)) for _ in range(-(-count // len(SCENES)))])[:count]
    scenes = [SCENES[i] for i in order]
    return scenes, np.stack([picture(scene, rng) for scene in scenes])


def read(image: np.ndarray) -> dict[str, str | None]:
    """The attributes of a picture, None where there is none to see."""
    covered = np.abs(image - GREY).max(-1) > FAR
    labels, found = ndimage.label(covered)
    sizes = ndimage.sum_labels(covered, labels, range(1, found + 1)) if found else np.zeros(0)
    parts = [i + 1 for i, size in enumerate(sizes) if size >= FEWEST]
    if not parts:
        return dict.fromkeys(ATTRIBUTES)
    kept = np.isin(labels, parts)
    colour = image[kept].mean(0)
    nearest = min(COLOURS, key=lambda name: float(np.square(colour - COLOURS[name]).sum()))
    y, x = (axis.mean() for axis in np.nonzero(kept))
    place = next(name for name, half in PLACES.items() if half == (int(y >= SIDE / 2), int(x >= SIDE / 2)))
    votes = [form_of(labels == part) for part in parts]
    return {
        "count": COUNTS[len(parts) - 1] if len(parts) <= len(COUNTS) else None,
        "colour": nearest,
        "form": max(FORMS, key=votes.count),
        "place": place,
    }


def form_of(shape: np.ndarray) -> str:
    """By the share of its box that a shape covers below and above: a triangle is wide below, a square fills it."""
    rows, columns = (np.flatnonzero(shape.any(axis)) for axis in (1, 0))
    box = shape[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    half = max(len(box) // 2, 1)
    above, below = box[:half].mean(), box[-half:].mean()
    if below - above > 0.2:
        return "triangle"
    # The corners tell a square from a circle.
    n = max(len(box) // 5, 1)
    m = max(box.shape[1] // 5, 1)
    corners = np.mean([box[:n, :m].mean(), box[:n, -m:].mean(), box[-n:, :m].mean(), box[-n:, -m:].mean()])
    return "square" if corners > 0.5 else "circle"


def matches(images: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """The share of pictures of which the reader sees each attribute as it should be, "all" four of them, and the
    "mean" over the four."""
    found = [read(image) for image in images]
    right = np.array([[f[n] == getattr(s, n) for n in ATTRIBUTES] for f, s in zip(found, scenes, strict=True)])
    shares = {name: float(right[:, i].mean()) for i, name in enumerate(ATTRIBUTES)}
    return shares | {"all": float(right.all(1).mean()), "mean": float(right.mean())}
