"""Say what a scene shows: captions, and questions with short answers. Pure: scene in, words out.

Every wording names only what the scene shows, so a training text never names a pair that no training picture shows.
Some captions list objects ("a large red circle"), others list one attribute at a time ("top left red, top right
blue"): the second kind teaches colour and shape apart, which is what lets a pair never seen together be read. Others
start from a shape or a colour in random order: they teach to look for a thing instead of reading on.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scenes import COLOURS, DIGITS, PLACES, SHAPES, WORDS, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True, kw_only=True)
class Question:
    kind: str
    text: str
    answer: str


def _total(scene: Scene) -> str:
    n = len(scene.shapes)
    return f"{NUMBERS[n]} shape{'s' if n > 1 else ''}"


def _printed(thing: Thing) -> str:
    return f"{PLACES[thing.place]} the {thing.kind} {thing.text}"


def _list(scene: Scene, attribute: str) -> str:
    return ", ".join(f"{PLACES[t.place]} {getattr(t, attribute)}" for t in scene.shapes)


def _last(scene: Scene) -> str:
    return f" Printed: {_printed(scene.printed)}." if scene.printed else ""


def _by_object(scene: Scene) -> str:
    """two shapes: top left a large red circle, bottom right a small blue heart."""
    said = [
        f"{PLACES[t.place]} a {t.size} {t.colour} {t.shape}" if t.kind == "shape" else _printed(t) for t in scene.things
    ]
    return f"{_total(scene)}: {', '.join(said)}."


def _form_first(scene: Scene) -> str:
    """I see two shapes: top left a circle, red and large; bottom right a heart, blue and small."""
    said = [
        f"{PLACES[t.place]} a {t.shape}, {t.colour} and {t.size}" if t.kind == "shape" else _printed(t)
        for t in scene.things
    ]
    return f"I see {_total(scene)}: {'; '.join(said)}."


def _colours_shapes_sizes(scene: Scene) -> str:
    """Colours: top left red, bottom right blue. Shapes: top left circle, ... Sizes: top left large, ..."""
    lists = f"Colours: {_list(scene, 'colour')}. Shapes: {_list(scene, 'shape')}. Sizes: {_list(scene, 'size')}."
    return lists + _last(scene)


def _shapes_colours(scene: Scene) -> str:
    """Shapes: top left circle, bottom right heart. Colours: top left red, bottom right blue."""
    return f"Shapes: {_list(scene, 'shape')}. Colours: {_list(scene, 'colour')}." + _last(scene)


PLACE_FIRST: tuple[Callable[[Scene], str], ...] = (_by_object, _form_first, _colours_shapes_sizes, _shapes_colours)


def _keyed(scene: Scene, rng: random.Random) -> str | None:
    """The star: red, small, top right. The circle: blue, large, top left.

    In random order, so that each description must be found by the key (a shape or a colour) and not by the order of
    places. Leaves out shapes that share their key; null when none is left.
    """
    key, other = rng.choice((("shape", "colour"), ("colour", "shape")))
    things = [t for t in scene.shapes if scene.unique(key, getattr(t, key))]
    rng.shuffle(things)
    fields = rng.sample((other, "size", "place"), 3)
    said = []
    for t in things:
        values = [PLACES[t.place] if f == "place" else getattr(t, f) for f in fields]
        said.append(f"The {getattr(t, key)}{' one' if key == 'colour' else ''}: {', '.join(values)}.")
    return " ".join(said) or None


def caption(scene: Scene, rng: random.Random) -> str:
    """One wording at random: half of them by place, half by shape or colour."""
    found = _keyed(scene, rng) if rng.random() < 0.5 else None
    return found or rng.choice(PLACE_FIRST)(scene)


def _name(scene: Scene, thing: Thing, rng: random.Random, *, hide: str) -> str | None:
    """A phrase that picks `thing` out without naming the attribute `hide`: "the circle", "the red shape",
    "the shape at the top left"; null when the draw is ambiguous."""
    ways = [w for w in ("colour", "shape", "place") if w != hide]
    way = rng.choice(ways)
    if way == "place":
        return f"the shape at the {PLACES[thing.place]}"
    if not scene.unique(way, getattr(thing, way)):
        return None
    return f"the {thing.shape}" if way == "shape" else f"the {thing.colour} shape"


def ask_colour(scene: Scene, rng: random.Random, thing: Thing | None = None) -> Question | None:
    thing = thing or rng.choice(scene.shapes)
    name = _name(scene, thing, rng, hide="colour")
    return name and Question(kind="colour", text=f"What colour is {name}?", answer=thing.colour)


def ask_shape(scene: Scene, rng: random.Random, thing: Thing | None = None) -> Question | None:
    thing = thing or rng.choice(scene.shapes)
    if rng.random() < 0.5:
        return Question(kind="shape", text=f"What shape is at the {PLACES[thing.place]}?", answer=thing.shape)
    if not scene.unique("colour", thing.colour):
        return None
    return Question(kind="shape", text=f"What shape is {thing.colour}?", answer=thing.shape)


def ask_size(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.shapes)
    name = _name(scene, thing, rng, hide="size")
    return name and Question(kind="size", text=f"What size is {name}?", answer=thing.size)


def ask_position(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    if thing.kind != "shape":
        return Question(kind="position", text=f"Where is the {thing.kind}?", answer=PLACES[thing.place])
    way = rng.choice(("colour", "shape"))
    if not scene.unique(way, getattr(thing, way)):
        return None
    name = f"the {thing.shape}" if way == "shape" else f"the {thing.colour} shape"
    return Question(kind="position", text=f"Where is {name}?", answer=PLACES[thing.place])


def ask_relation(scene: Scene, rng: random.Random, pair: Sequence[Thing] | None = None) -> Question | None:
    """Of two shapes in one row or one column: left, right, above or below."""
    if len(scene.shapes) < 2:
        return None
    one, other = pair or rng.sample(scene.shapes, 2)
    across, down = one.place % 2 - other.place % 2, one.place // 2 - other.place // 2
    names = [_name(scene, t, rng, hide="place") for t in (one, other)]
    if (across and down) or None in names:
        return None
    answer = ("left" if across < 0 else "right") if across else ("above" if down < 0 else "below")
    return Question(kind="relation", text=f"Where is {names[0]} seen from {names[1]}?", answer=answer)


def relations(scene: Scene, rng: random.Random) -> list[Question]:
    """About every two shapes of one row or one column that can be named, each pair once, in random order."""
    pairs = [rng.sample(pair, 2) for pair in itertools.combinations(scene.shapes, 2)]
    rng.shuffle(pairs)
    return [question for pair in pairs if (question := ask_relation(scene, rng, pair))]


def ask_count(scene: Scene, rng: random.Random) -> Question:
    return Question(kind="count", text="How many shapes are there?", answer=NUMBERS[len(scene.shapes)])


def ask_printed(scene: Scene, rng: random.Random) -> Question | None:
    thing = scene.printed
    return thing and Question(kind=thing.kind, text=f"What {thing.kind} is printed?", answer=thing.text)


ASK: tuple[Callable[[Scene, random.Random], Question | None], ...] = (
    *(5 * (ask_shape,)),
    *(4 * (ask_colour,)),
    *(2 * (ask_position,)),
    ask_relation,
    ask_count,
    ask_size,
    ask_printed,
)
"""Drawn from at random."""


def questions(scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """At least one and up to `count` different questions about the scene.

    None can be answered from the ones before it, without looking: "What shape is red?", "star" would give away what
    colour the star is. Most of those that name a place are left out: what stands where is learned early, from the
    captions; finding a thing by its shape or colour is the harder half of the work.
    """
    found: list[Question] = []
    for _ in range(8 * count):
        question = rng.choice(ASK)(scene, rng)
        if not question or (" at the " in question.text and rng.random() < 0.7):
            continue
        said = " ".join(f"{q.text} {q.answer}" for q in found)
        if len(found) < count and question.answer not in said:
            found.append(question)
    return found or [ask_count(scene, rng)]


def ask_compare(scenes: Sequence[Scene], rng: random.Random) -> Question | None:
    """About two pictures: which has more shapes, or which holds a shape or a colour that the other lacks."""
    first, second = scenes
    way = rng.choice(("count", "shape", "colour"))
    if way == "count":
        one, other = len(first.shapes), len(second.shapes)
        if one == other:
            return None
        answer = "first" if one > other else "second"
        return Question(kind="compare", text="Which image has more shapes?", answer=answer)
    have, lack = ({getattr(t, way) for t in s.shapes} for s in (first, second))
    only = sorted(have ^ lack)
    if not only:
        return None
    value = rng.choice(only)
    thing = f"a {value}" if way == "shape" else f"a {value} shape"
    return Question(kind="compare", text=f"Which image has {thing}?", answer="first" if value in have else "second")


def text_only(rng: random.Random) -> Question:
    """A question that needs no picture. Never names a colour and a shape together."""
    way = rng.randrange(4)
    if way == 0:
        a, b = rng.randint(0, 4), rng.randint(0, 4)
        text, answer = f"What is {a} plus {b}?", str(a + b)
    elif way == 1:
        word = rng.choice(WORDS)
        text, answer = f"Spell the word {word}.", " ".join(word)
    elif way == 2:
        sides = rng.choice((("triangle", "three"), ("square", "four"), ("circle", "zero")))
        text, answer = f"How many corners has a {sides[0]}?", sides[1]
    else:
        word = rng.choice(COLOURS + SHAPES + DIGITS)
        kind = "colour" if word in COLOURS else "shape" if word in SHAPES else "digit"
        text, answer = f"What is {word}: a colour, a shape or a digit?", kind
    return Question(kind="text", text=text, answer=answer)
