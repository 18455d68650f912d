"""Make the shapes data: `python data/shapes/prepare.py out=DIR [images=32000 seed=0 questions=200 workers=2]`.

Writes DIR/captions/NNNNN.tar (img2dataset's layout), DIR/instruct.json, DIR/relations.json and DIR/images/ (LLaVA's
layout), DIR/eval.json and DIR/eval_images/ (held-out questions). Half of the training images carry captions, half
conversations.
The same arguments give the same bytes, whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from itertools import repeat
from pathlib import Path

import text
from render import SIDE, jpeg
from scenes import HELD_OUT, Scene, draw_scene, seen_pairs, training_scene

SHARD = 1000
CAPTION_REQUESTS = ("Describe the image.", "What do you see?")


@dataclass(kw_only=True)
class Options:
    out: str = ""
    images: int = 32000
    """Training images, captions and conversations together."""
    seed: int = 0
    questions: int = 200
    """Evaluation questions of each kind."""
    holdout: int = len(HELD_OUT)
    """How many of the listed (colour, shape) pairs to keep out of training."""
    workers: int = 2

    @property
    def held_out(self) -> tuple[tuple[str, str], ...]:
        return HELD_OUT[: self.holdout]


def parse(arguments: list[str]) -> Options:
    """key=value words -> Options. Exits with one line on a word that it does not know."""
    kinds = {f.name: type(f.default) for f in fields(Options)}
    values = {}
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals or key not in kinds:
            sys.exit(f"{word!r} is not an option; give key=value with a key of: {', '.join(kinds)}")
        try:
            values[key] = kinds[key](value)
        except ValueError:
            sys.exit(f"{key}={value} is not a whole number")
    options = Options(**values)
    if not options.out:
        sys.exit("where to? give out=DIR")
    if not 0 <= options.holdout <= len(HELD_OUT):
        sys.exit(f"holdout={options.holdout} is outside 0 to {len(HELD_OUT)}")
    if options.images < 4 or options.questions < 1 or options.workers < 1:
        sys.exit("images must be at least 4, questions and workers at least 1")
    return options


# -- captions -----------------------------------------------------------------------------------------------------


def write_caption_shard(options: Options, start: int, stop: int) -> None:
    """Images start..stop-1 as one tar of NNNNNNNNN.jpg/.txt/.json."""
    pairs = seen_pairs(options.held_out)
    path = Path(options.out, "captions", f"{start // SHARD:05d}.tar")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(start, stop):
            scene = training_scene(options.seed, "captions", index, pairs)
            caption = text.caption(scene, random.Random(f"{options.seed}/caption/{index}"))
            data = jpeg(scene)
            key = f"{start // SHARD:05d}{index - start:04d}"
            about = {
                "caption": caption,
                "url": f"shapes://{options.seed}/captions/{index}",
                "key": key,
                "status": "success",
                "error_message": None,
                "width": SIDE,
                "height": SIDE,
                "original_width": SIDE,
                "original_height": SIDE,
                "exif": "{}",
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            for ending, body in (("jpg", data), ("txt", caption.encode()), ("json", json.dumps(about).encode())):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))


# -- conversations ------------------------------------------------------------------------------------------------


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    """(human, gpt) pairs -> LLaVA's list of turns."""
    return [{"from": who, "value": words} for pair in pairs for who, words in zip(("human", "gpt"), pair, strict=True)]


def conversation(options: Options, index: int, scene: Scene, neighbour: Scene) -> dict:
    """One row about image `index`: a caption, one question, several turns, two images, or no image at all."""
    rng = random.Random(f"{options.seed}/talk/{index}")
    name, other = image_name(index), image_name(index + 1)
    way = rng.choices(("many", "caption", "single", "two", "text"), (68, 6, 6, 14, 6))[0]
    row = {"id": f"shapes-{index:06d}", "image": name}
    if way == "text":
        return {"id": row["id"], "conversations": turns(*((q.text, q.answer) for q in (text.text_only(rng),)))}
    if way == "two":
        found = {q.text: q for q in (text.ask_compare((scene, neighbour), rng) for _ in range(8)) if q}
        if found:
            asked = [(q.text, q.answer) for q in list(found.values())[:4]]
            asked[0] = (f"<image>\n<image>\n{asked[0][0]}", asked[0][1])
            return row | {"image": [name, other], "conversations": turns(*asked)}
    if way == "caption":
        asked = [(rng.choice(CAPTION_REQUESTS), text.caption(scene, rng))]
    else:
        asked = [(q.text, q.answer) for q in text.questions(scene, rng, 1 if way == "single" else rng.randint(5, 8))]
        if way == "many" and rng.random() < 0.3:
            # Last: before the questions it would let them be answered from the text, without looking
            asked.append((rng.choice(CAPTION_REQUESTS), text.caption(scene, rng)))
    asked[0] = (f"<image>\n{asked[0][0]}", asked[0][1])
    return row | {"conversations": turns(*asked)}


def relations(options: Options, index: int, scene: Scene) -> list[dict]:
    """A row about how the shapes of image `index` lie to one another, or none where no two can be compared."""
    rng = random.Random(f"{options.seed}/relations/{index}")
    asked = [(q.text, q.answer) for q in text.relations(scene, rng)]
    if not asked:
        return []
    asked[0] = (f"<image>\n{asked[0][0]}", asked[0][1])
    return [{"id": f"shapes-relations-{index:06d}", "image": image_name(index), "conversations": turns(*asked)}]


def image_name(index: int) -> str:
    return f"{index:06d}.jpg"


def write_conversations(options: Options, start: int, stop: int, total: int) -> tuple[list[dict], list[dict]]:
    """Write images start..stop-1; the rows of instruct.json about them (two-image rows also show the next image) and
    those of relations.json."""
    pairs = seen_pairs(options.held_out)
    rows, related = [], []
    for index in range(start, stop):
        scene = training_scene(options.seed, "talk", index, pairs)
        Path(options.out, "images", image_name(index)).write_bytes(jpeg(scene))
        if index + 1 < total:
            rows.append(conversation(options, index, scene, training_scene(options.seed, "talk", index + 1, pairs)))
        related += relations(options, index, scene)
    return rows, related


# -- evaluation ---------------------------------------------------------------------------------------------------


def held_out_scene(rng: random.Random, options: Options, kind: str) -> tuple[Scene, text.Question | None]:
    """A scene that training never shows and a question of this kind about it (null when the draw has none)."""
    pairs = seen_pairs(options.held_out)
    if kind.endswith("_unseen"):
        target = rng.choice(options.held_out)
        scene = draw_scene(rng, pairs, required=target)
        thing = next(t for t in scene.shapes if t.pair == target)
        asks = {"colour_unseen": text.ask_colour, "shape_unseen": text.ask_shape}
        return scene, asks[kind](scene, rng, thing) if kind in asks else text.ask_count(scene, rng)
    printed = kind if kind in ("word", "digit") else None
    # Of two shapes: how they lie to one another is the question, not which of many is meant
    scene = draw_scene(rng, pairs, count=2 if kind == "relation" else None, printed=printed)
    ask: Callable[[Scene, random.Random], text.Question | None] = {
        "colour": text.ask_colour,
        "shape": text.ask_shape,
        "count": text.ask_count,
        "size": text.ask_size,
        "position": text.ask_position,
        "relation": text.ask_relation,
        "word": text.ask_printed,
        "digit": text.ask_printed,
    }[kind]
    return scene, ask(scene, rng) if scene.for_evaluation() else None


KINDS = {
    "colour": 8, "shape": 6, "count": 4, "size": 2, "position": 4, "relation": 4, "word": 8, "digit": 10, "compare": 2,
    "colour_unseen": 0, "shape_unseen": 0, "count_unseen": 4,
}  # fmt: skip
"""Question kind -> number of its answers (0 = one a held-out pair); each is asked equally often."""


def evaluation_rows(options: Options, kind: str) -> tuple[list[dict], dict[str, Scene]]:
    """Rows of one kind with balanced answers, and the scenes of their images by file name."""
    rng = random.Random(f"{options.seed}/eval/{kind}")
    quota = math.ceil(options.questions / (KINDS[kind] or options.holdout))
    asked: Counter[str] = Counter()
    rows, pictures, contents = [], {}, set()
    for _ in range(400 * options.questions):
        if kind == "compare":
            drawn = [held_out_scene(rng, options, "colour")[0] for _ in range(2)]
            question = text.ask_compare(drawn, rng) if all(s.for_evaluation() for s in drawn) else None
        else:
            one, question = held_out_scene(rng, options, kind)
            drawn = [one]
        content = "/".join(s.content() for s in drawn) + (question.text if question else "")
        if question is None or asked[question.answer] >= quota or content in contents:
            continue
        asked[question.answer] += 1
        contents.add(content)
        names = [f"{kind}-{len(rows):04d}{'ab'[k] if len(drawn) > 1 else ''}.jpg" for k in range(len(drawn))]
        pictures |= dict(zip(names, drawn, strict=True))
        rows.append(
            {
                "id": f"{kind}-{len(rows):04d}",
                "image": names if len(names) > 1 else names[0],
                "conversations": turns(("<image>\n" * len(names) + question.text, question.answer)),
                "kind": kind,
            }
        )
        if len(rows) == options.questions:
            return rows, pictures
    sys.exit(f"only {len(rows)} different {kind} questions found; ask for fewer with questions={len(rows)}")


def write_evaluation(options: Options, kind: str) -> list[dict]:
    rows, pictures = evaluation_rows(options, kind)
    for name, scene in pictures.items():
        Path(options.out, "eval_images", name).write_bytes(jpeg(scene))
    return rows


def main() -> None:
    options = parse(sys.argv[1:])
    out = Path(options.out)
    for folder in ("captions", "images", "eval_images"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    captioned = options.images // 2
    talked = options.images - captioned
    kinds = [k for k in KINDS if options.holdout or not k.endswith("_unseen")]
    with ProcessPoolExecutor(options.workers) as pool:
        starts = range(0, captioned, SHARD)
        captions = pool.map(write_caption_shard, repeat(options), starts, [min(s + SHARD, captioned) for s in starts])
        starts = range(0, talked, SHARD)
        stops = [min(s + SHARD, talked) for s in starts]
        talks = pool.map(write_conversations, repeat(options), starts, stops, repeat(talked))
        checks = pool.map(write_evaluation, repeat(options), kinds)
        list(captions)
        instruct, related = ([row for rows in column for row in rows] for column in zip(*talks, strict=True))
        evaluation = [row for rows in checks for row in rows]
    for name, rows in (("instruct.json", instruct), ("relations.json", related), ("eval.json", evaluation)):
        (out / name).write_text(json.dumps(rows, indent=0) + "\n")
    counts = f"{len(instruct)} conversations, {len(related)} more about relations"
    print(f"{out}: {captioned} captioned images, {counts}, {len(evaluation)} evaluation questions")


if __name__ == "__main__":
    main()
