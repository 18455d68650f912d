"""Make up scenes: what stands in each quarter of a picture. Pure: no pixels, no files, every scene from its own seed.

A scene has four places; each is empty or holds a shape, a printed word or a printed digit:

    top left    | top right          e.g.  large red circle | (empty)
    bottom left | bottom right             the word "sun"   | small blue star
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

PLACES = ("top left", "top right", "bottom left", "bottom right")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = ("small", "large")
WORDS = ("sun", "sea", "cat", "dog", "tea", "map", "owl", "box")
DIGITS = tuple("0123456789")

HELD_OUT = (
    ("red", "star"),
    ("orange", "cross"),
    ("yellow", "circle"),
    ("green", "heart"),
    ("blue", "triangle"),
    ("purple", "square"),
)
"""Pairs that no training picture shows and no training text names. Each colour and each shape is in one at most."""

MAX_SHAPES = 4
EVAL_BUCKETS, BUCKETS = 1, 10
"""One scene in ten, chosen by a hash of its content, is kept for evaluation."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One occupant of a place. A shape has colour, shape and size; a word or a digit has text."""

    place: int
    kind: str
    """shape | word | digit"""
    colour: str = ""
    shape: str = ""
    size: str = ""
    text: str = ""
    dx: float = 0.0
    dy: float = 0.0
    """Where it stands in its place: -1 to 1 of the free room."""
    tilt: float = 0.0
    """Rotation, degrees."""

    @property
    def pair(self) -> tuple[str, str]:
        return (self.colour, self.shape)


@dataclass(frozen=True, kw_only=True)
class Scene:
    things: tuple[Thing, ...]
    """In reading order, at most one a place."""
    backdrop: int
    """Number of the background's tint."""

    @property
    def shapes(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if t.kind == "shape")

    @property
    def printed(self) -> Thing | None:
        """The word or the digit, if the scene has one."""
        return next((t for t in self.things if t.kind != "shape"), None)

    def unique(self, attribute: str, value: str) -> bool:
        """True when exactly one shape has this value: then "the red shape" names it."""
        return sum(getattr(t, attribute) == value for t in self.shapes) == 1

    def content(self) -> str:
        """What the scene shows, without jitter and tint: two scenes with equal content are the same scene."""
        return ";".join(f"{t.place}{t.colour} {t.shape} {t.size}{t.text}" for t in self.things)

    def for_evaluation(self) -> bool:
        """True when the content belongs to the held-out tenth: a training scene never has it."""
        digest = hashlib.sha256(self.content().encode()).digest()
        return digest[0] % BUCKETS < EVAL_BUCKETS


def seen_pairs(held_out: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """All (colour, shape) pairs but the held-out ones, in a fixed order."""
    return [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in held_out]


def draw_scene(
    rng: random.Random,
    pairs: list[tuple[str, str]],
    *,
    count: int | None = None,
    printed: str | None = None,
    required: tuple[str, str] | None = None,
) -> Scene:
    """A random scene of `pairs`; `count` shapes if given; `printed` is word, digit, none or null for a random choice;
    `required` puts that pair in, once."""
    if printed is None:
        printed = rng.choice(("none", "none", "none", "word", "digit"))
    room = MAX_SHAPES if printed == "none" else MAX_SHAPES - 1
    count = rng.randint(1, room) if count is None else min(count, room)
    chosen = [rng.choice(pairs) for _ in range(count)]
    if required is not None:
        chosen[0] = required
    places = rng.sample(range(len(PLACES)), count + (printed != "none"))

    def pose() -> dict[str, float]:
        return {"dx": rng.uniform(-1, 1), "dy": rng.uniform(-1, 1), "tilt": rng.uniform(-8, 8)}

    things = [
        Thing(place=place, kind="shape", colour=colour, shape=shape, size=rng.choice(SIZES), **pose())
        for place, (colour, shape) in zip(places, chosen, strict=False)
    ]
    if printed != "none":
        text = rng.choice(WORDS if printed == "word" else DIGITS)
        things.append(Thing(place=places[-1], kind=printed, text=text, **pose()))
    return Scene(things=tuple(sorted(things, key=lambda t: t.place)), backdrop=rng.randrange(1000))


def training_scene(seed: int, name: str, index: int, pairs: list[tuple[str, str]]) -> Scene:
    """Scene number `index` of the training set `name`: a pure function of its arguments, never a held-out scene."""
    rng = random.Random(f"{seed}/train/{name}/{index}")
    while True:
        scene = draw_scene(rng, pairs)
        if not scene.for_evaluation():
            return scene
