"""The shapes data: nothing held out leaks, answers are balanced and true, the layouts are the promised ones."""

from __future__ import annotations

import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

SHAPES = Path(__file__).parents[2] / "data" / "shapes"


def make(out: Path, *words: str) -> Path:
    command = [sys.executable, str(SHAPES / "prepare.py"), f"out={out}", "images=300", "questions=24", *words]
    subprocess.run(command, check=True, capture_output=True)
    return out


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("shapes"), "workers=2")


def names_pair(words: str, colour: str, shape: str) -> bool:
    """In any of the wordings of text.py: "red star", "a star, red and", "The star: red", "The red one: star"."""
    forms = (f"{colour} {shape}", f"{shape}, {colour}", f"{shape}: {colour}", f"{colour} one: {shape}")
    return any(form in words for form in forms)


def test_training_never_shows_or_names_a_held_out_pair(made: Path) -> None:
    import scenes
    import text

    pairs = scenes.seen_pairs(scenes.HELD_OUT)
    for index in range(1000):
        scene = scenes.training_scene(0, "captions", index, pairs)
        assert not {t.pair for t in scene.shapes} & set(scenes.HELD_OUT)
        assert not scene.for_evaluation()
    words = (made / "instruct.json").read_text() + (made / "relations.json").read_text()
    with tarfile.open(made / "captions" / "00000.tar") as tar:
        words += " ".join(tar.extractfile(m).read().decode() for m in tar.getmembers() if m.name.endswith(".txt"))
    words += " ".join(text.text_only(random.Random(k)).text for k in range(300))
    assert [p for p in scenes.HELD_OUT if names_pair(words, *p)] == []
    assert sum(names_pair(words, *p) for p in pairs) == len(pairs), "this test would see nothing"


def test_every_evaluation_scene_is_new(made: Path) -> None:
    import prepare
    import scenes

    options = prepare.Options(out="unused", questions=24)
    for kind in prepare.KINDS:
        rows, pictures = prepare.evaluation_rows(options, kind)
        held_out = [any(t.pair in scenes.HELD_OUT for t in scene.shapes) for scene in pictures.values()]
        if kind.endswith("_unseen"):
            assert all(held_out)
        else:
            assert not any(held_out) and all(scene.for_evaluation() for scene in pictures.values())
        answers = Counter(row["conversations"][1]["value"] for row in rows)
        assert len(rows) == 24 and max(answers.values()) <= -(-24 // (prepare.KINDS[kind] or 6))


def test_unseen_questions_ask_about_the_held_out_object(made: Path) -> None:
    import prepare
    import scenes

    for kind, attribute in (("colour_unseen", 0), ("shape_unseen", 1)):
        rows, pictures = prepare.evaluation_rows(prepare.Options(out="unused", questions=24), kind)
        for row in rows:
            target = next(t for t in pictures[row["image"]].shapes if t.pair in scenes.HELD_OUT)
            question, answer = (turn["value"] for turn in row["conversations"])
            assert answer == target.pair[attribute]
            other = target.pair[1 - attribute]
            assert other in question or scenes.PLACES[target.place] in question


def test_layouts(made: Path) -> None:
    with tarfile.open(made / "captions" / "00000.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["000000000.jpg", "000000000.txt", "000000000.json"] and len(names) == 450
        data = tar.extractfile("000000007.jpg").read()
        about = json.load(tar.extractfile("000000007.json"))
        assert about["caption"] == tar.extractfile("000000007.txt").read().decode()
    assert about["sha256"] == hashlib.sha256(data).hexdigest()
    assert Image.open(io.BytesIO(data)).size == (about["width"], about["height"]) == (64, 64)
    ways = Counter()
    for name, folder in (("instruct.json", "images"), ("relations.json", "images"), ("eval.json", "eval_images")):
        for row in json.loads((made / name).read_text()):
            images = row.get("image", [])
            images = [images] if isinstance(images, str) else images
            said = [turn["value"] for turn in row["conversations"]]
            assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(said) // 2)
            assert sum(s.count("<image>") for s in said) == said[0].count("<image>") == len(images)
            assert all((made / folder / image).is_file() for image in images) and all(said)
            ways[len(images), len(said) > 2] += name == "instruct.json"
    assert all(ways[key] for key in ((0, False), (1, False), (1, True), (2, True))), ways


def test_relations_are_true_and_said_once(made: Path) -> None:
    import scenes

    rows = json.loads((made / "relations.json").read_text())
    assert len(rows) > 40
    steps = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
    pairs = scenes.seen_pairs(scenes.HELD_OUT)
    for row in rows:
        scene = scenes.training_scene(0, "talk", int(row["image"].removesuffix(".jpg")), pairs)
        said = [turn["value"] for turn in row["conversations"]]
        asked = set()
        for question, answer in zip(said[::2], said[1::2], strict=True):
            words = question.removeprefix("<image>\n").removeprefix("Where is the ").removesuffix("?")
            places = []
            for name in words.split(" seen from the "):
                word = name.removesuffix(" shape")
                places += [t.place for t in scene.shapes if word in (t.colour, t.shape)]
            assert len(places) == 2, question
            one, other = places
            assert (one % 2 - other % 2, one // 2 - other // 2) == steps[answer], (question, answer)
            asked.add(frozenset(places))
        assert len(asked) == len(said) // 2, "a pair that is asked about twice gives its answer away"


def test_same_arguments_give_the_same_bytes(made: Path, tmp_path: Path) -> None:
    assert digests(make(tmp_path / "again", "workers=1")) == digests(made)
    assert digests(make(tmp_path / "other", "seed=1")) != digests(made)


@pytest.mark.parametrize("word", ["image=3", "images", "images=many", "holdout=9"])
def test_bad_option_is_one_line(word: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SHAPES / "prepare.py"), f"out={tmp_path}", word]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and len(done.stderr.strip().splitlines()) == 1
