"""The painted world: 64x64 pictures of one shape on a plain background, with exact ground truth and captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

EDGE = 64  # pixels
BACKGROUNDS = {"white": 235, "grey": 128, "black": 22}  # grey level of the plain background, 0..255
COLOURS = {
    "red": (222, 38, 42),
    "yellow": (236, 216, 48),
    "green": (42, 168, 68),
    "blue": (42, 84, 216),
    "purple": (162, 46, 186),
    "cyan": (70, 206, 222),
}
HELD_OUT_COLOUR = "flamingo"  # a pink that only the VAE has seen, beyond every mixture of the others
HELD_OUT_SHAPE = "lozenge"
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": 8.5, "large": 14.5}  # radius in pixels
SIDES = {"left": 20.0, "right": 44.0}  # x of the centre in pixels
TEMPLATES = ("sentence", "background first", "tags")
JITTER = {"channel": 6.0, "level": 6.0, "x": 2.0, "y": 7.0, "small": 0.5, "large": 0.9}  # all uniform, plus or minus


def palette(held_out: bool = True) -> dict[str, tuple[int, int, int]]:
    """Colour words and their RGB values (0..255), by default with the held-out colour at the end."""
    return {**COLOURS, HELD_OUT_COLOUR: (252, 130, 248)} if held_out else dict(COLOURS)


def shapes(held_out: bool = True) -> tuple[str, ...]:
    """Shape words, by default with the held-out shape at the end."""
    return (*SHAPES, HELD_OUT_SHAPE) if held_out else SHAPES


@dataclass(frozen=True)
class Scene:
    """The exact content of one picture, in words of this world; raises ValueError on a word it does not know."""

    shape: str
    colour: str
    background: str
    size: str
    side: str

    def __post_init__(self) -> None:
        known = {
            "shape": shapes(),
            "colour": tuple(palette()),
            "background": tuple(BACKGROUNDS),
            "size": tuple(SIZES),
            "side": tuple(SIDES),
        }
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise ValueError(f"scene: {name} is {getattr(self, name)!r}; it must be one of {', '.join(words)}")


ATTRIBUTES = ("shape", "colour", "background", "size", "side")


def in_base(scene: Scene) -> bool:
    """Whether the UNet was trained on this combination of all five attributes (at most 60 %, no held-out word)."""
    if scene.colour == HELD_OUT_COLOUR or scene.shape == HELD_OUT_SHAPE:
        return False
    shape, colour = SHAPES.index(scene.shape), list(COLOURS).index(scene.colour)
    place = list(SIZES).index(scene.size) + 2 * list(SIDES).index(scene.side)
    # Three residues of five: of the four sizes and sides of every shape, colour and background two or three are there.
    return (shape + 2 * colour + list(BACKGROUNDS).index(scene.background) + place) % 5 < 3


def all_scenes(held_out: bool = False) -> list[Scene]:
    """Every scene of the world in a fixed order (360 without, 504 with the held-out words)."""
    return [
        Scene(shape, colour, background, size, side)
        for shape in shapes(held_out)
        for colour in palette(held_out)
        for background in BACKGROUNDS
        for size in SIZES
        for side in SIDES
    ]


def draw_scenes(count: int, rng: np.random.Generator, kind: str = "base") -> list[Scene]:
    """`count` random scenes: kind `base` (the UNet's training set), `open` (all without held-out words), `all`.

    Raises ValueError on another kind.
    """
    if kind not in ("base", "open", "all"):
        raise ValueError(f"draw_scenes: kind is {kind!r}; it must be base, open or all")
    pool = all_scenes(held_out=kind == "all")
    if kind == "base":
        pool = [scene for scene in pool if in_base(scene)]
    return [pool[index] for index in rng.integers(0, len(pool), count)]


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels (negative inside) of points relative to the shape's centre; y points down.

    The arrays broadcast against each other. Raises ValueError on an unknown shape.
    """
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(ax, ay) - 0.86 * radius
    if shape == "triangle":  # upright: top at -radius, base at 0.8 radius, half base 1.05 radius
        slope = 1.8 / 1.05
        side = (slope * ax - (y + radius)) / np.hypot(slope, 1.0)
        return np.maximum(side, y - 0.8 * radius)
    if shape == "cross":
        arm = 0.32 * radius
        return np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ax - arm, ay - radius))
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.73 * radius) - 0.27 * radius
    if shape == "lozenge":
        return (ax + ay - 1.15 * radius) / np.sqrt(2.0)
    raise ValueError(f"distance: shape is {shape!r}; it must be one of {', '.join(shapes())}")


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Antialiased coverage in 0..1 of the shape over the picture, `N x 64 x 64`; x, y, radius are `N` in pixels."""
    grid = np.arange(EDGE, dtype=np.float32) + 0.5
    column = grid[None, None, :] - np.asarray(x, np.float32)[:, None, None]
    row = grid[None, :, None] - np.asarray(y, np.float32)[:, None, None]
    return np.clip(0.5 - distance(shape, column, row, np.asarray(radius, np.float32)[:, None, None]), 0.0, 1.0)


def render(scenes: list[Scene], rng: np.random.Generator) -> np.ndarray:
    """Pictures of the scenes with small jitters from `rng`, uint8 `N x 64 x 64 x 3`."""
    count, colours = len(scenes), palette()
    spread = rng.uniform(-1.0, 1.0, (count, 7)).astype(np.float32)
    x = np.array([SIDES[scene.side] for scene in scenes], np.float32) + JITTER["x"] * spread[:, 0]
    y = EDGE / 2 + JITTER["y"] * spread[:, 1]
    radius = np.array([SIZES[s.size] for s in scenes], np.float32)
    radius += np.array([JITTER[s.size] for s in scenes], np.float32) * spread[:, 2]
    level = np.array([BACKGROUNDS[s.background] for s in scenes], np.float32) + JITTER["level"] * spread[:, 3]
    paint = np.array([colours[s.colour] for s in scenes], np.float32) + JITTER["channel"] * spread[:, 4:7]
    alpha = np.zeros((count, EDGE, EDGE), np.float32)
    names = np.array([s.shape for s in scenes])
    for shape in shapes():
        rows = np.flatnonzero(names == shape)
        if len(rows):
            alpha[rows] = coverage(shape, x[rows], y[rows], radius[rows])
    alpha = alpha[..., None]
    picture = level[:, None, None, None] * (1 - alpha) + paint[:, None, None, :] * alpha
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def caption(
    scene: Scene,
    keep: tuple[str, ...] = ATTRIBUTES,
    template: str = "sentence",
    colour_word: str | None = None,
    shape_word: str | None = None,
) -> str:
    """The scene in words, naming only the attributes in `keep`; empty when none is kept.

    `colour_word` and `shape_word` replace the words of kept attributes, for a concept under a new name.
    Raises ValueError on a template that is not in TEMPLATES.
    """
    if template not in TEMPLATES:
        raise ValueError(f"caption: template is {template!r}; it must be one of {', '.join(TEMPLATES)}")
    if not keep:
        return ""
    colour = (colour_word or scene.colour) if "colour" in keep else ""
    noun = (shape_word or scene.shape) if "shape" in keep else "shape"
    size = scene.size if "size" in keep else ""
    ground = f"{scene.background} background" if "background" in keep else ""
    if template == "tags":
        side = scene.side if "side" in keep else ""
        return ", ".join(part for part in (" ".join(w for w in (colour, noun) if w), size, side, ground) if part)
    words = " ".join(part for part in ("a", size, colour, noun) if part)
    words += f" on the {scene.side}" if "side" in keep else ""
    return ", ".join(p for p in ((ground, words) if template == "background first" else (words, ground)) if p)


def draw_caption(
    scene: Scene, rng: np.random.Generator, drop: float = 0.3, drop_all: float = 0.1, nonsense: float = 0.08
) -> str:
    """A training caption: each attribute dropped with probability `drop`, everything with `drop_all`.

    With probability `nonsense` a dropped colour or shape is stood for by a random word, so that a word the base
    does not know is nothing unusual to it; the held-out words never appear.
    """
    dice = rng.random(len(ATTRIBUTES) + 3)
    if dice[0] < drop_all:
        return ""
    keep = tuple(name for name, value in zip(ATTRIBUTES, dice[3:], strict=True) if value >= drop)
    template = TEMPLATES[0] if dice[1] < 0.7 else TEMPLATES[1] if dice[1] < 0.85 else TEMPLATES[2]
    missing = [name for name in ("colour", "shape") if name not in keep]
    if missing and dice[2] < nonsense:
        name = missing[int(rng.integers(len(missing)))]
        return caption(scene, (*keep, name), template, **{f"{name}_word": draw_word(rng)})
    return caption(scene, keep, template)


def draw_word(rng: np.random.Generator) -> str:
    """A random lower-case word of 3 to 8 letters that is none of this world's words."""
    while True:
        word = "".join(chr(97 + int(letter)) for letter in rng.integers(0, 26, int(rng.integers(3, 9))))
        if word not in words():
            return word


def words() -> tuple[str, ...]:
    """Every word that captions can contain, held-out words included, sorted."""
    return tuple(sorted({"a", "on", "the", "background", "shape", *shapes(), *palette(), *BACKGROUNDS, *SIZES, *SIDES}))


def write_folder(folder: Path, scenes: list[Scene], seed: int) -> list[Path]:
    """Write `NN.png` and `NN.txt` (the full caption) for every scene into `folder`; returns the picture paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths, pictures = [], render(scenes, np.random.default_rng(seed))
    for number, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        path = folder / f"{number:02d}.png"
        Image.fromarray(picture).save(path, optimize=True)
        path.with_suffix(".txt").write_text(caption(scene) + "\n", encoding="utf-8")
        paths.append(path)
    return paths
