"""One bad row, whatever is in it, is one dropped sample: prepare ends with nothing but a UserError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.raw_data import picture, turns
from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.data.prepare.run import prepare
from vlm_nemo.data.raw.messages import pick_answer
from vlm_nemo.data.raw.table import read_list
from vlm_nemo.data.raw.unit import RawDrop, attempt, facts_of
from vlm_nemo.data.sample import BAD_JSON, printable
from vlm_nemo.data.storage.shards import ShardFolder
from vlm_nemo.types import UserError

HALF = "\ud83d"
GOOD = {
    "llava": {"id": 1, "image": "0.jpg", "conversations": turns("<image>\nHue?", "red")},
    "vqa": {"image": "0.jpg", "question": "Hue?", "answer": "red"},
    "interleaved": {"images": [None, "0.jpg"], "texts": ["red", None]},
}
SOURCES = {
    "llava": "{kind: llava, json: rows.jsonl, images: images}",
    "vqa": "{kind: vqa, path: rows.jsonl, images: images, group: kind}",
    "interleaved": "{kind: interleaved, path: rows.jsonl, images: images}",
}
DEEP = '{"id": ' + "[" * 100_000 + "]" * 100_000 + "}"
BAD: list[tuple[str, Any]] = [
    ("llava", GOOD["llava"] | {"conversations": turns("<image>\nHue?", "red " + HALF)}),
    ("llava", GOOD["llava"] | {"kind": HALF}),
    ("llava", GOOD["llava"] | {"source": HALF}),
    ("llava", GOOD["llava"] | {HALF: "a"}),
    ("llava", {"id": HALF, "conversations": 3}),
    ("llava", GOOD["llava"] | {"conversations": [{"from": [], "value": "x"}]}),
    ("llava", GOOD["llava"] | {"conversations": [{"from": {}, "value": "x"}]}),
    ("vqa", GOOD["vqa"] | {"answer": HALF}),
    ("vqa", GOOD["vqa"] | {"kind": HALF}),
    ("vqa", GOOD["vqa"] | {"question": [[]]}),
    ("interleaved", GOOD["interleaved"] | {"texts": ["red" + HALF, None]}),
    ("interleaved", GOOD["interleaved"] | {"general_metadata": json.dumps({"url": HALF})}),
]


def run(
    folder: Path, kind: str, lines: list[str | bytes], *, listed: bool = False, **changes: Any
) -> tuple[dict[str, Any], list[Any]]:
    """Prepare a file of these lines of JSON, or a list of them; the manifest, and its records. It must not raise."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "images" / "0.jpg").write_bytes(picture(1))
    rows = [x if isinstance(x, bytes) else x.encode() for x in lines]
    name = "rows.json" if listed else "rows.jsonl"
    (folder / name).write_bytes(b"\n [" + b", ".join(rows) + b"]\n" if listed else b"\n".join(rows))
    (folder / "manifest.yaml").write_text(f"sources: {{a: {SOURCES[kind]}}}".replace("rows.jsonl", name))
    given = {"out": str(folder / "out"), "workers": 1, "max_bad_fraction": 1.0} | changes
    manifest = prepare(PrepareConfig(manifest=str(folder / "manifest.yaml"), **given))["a"]
    told = json.loads((folder / "out" / "ledger.json").read_text())
    assert told["seen"] == told["used"] + sum(told["dropped"].get("a", {}).values()) == len(lines)
    records = ShardFolder(folder / "out" / "a")
    return manifest, [records.record(i) for i in range(len(records))]


@pytest.mark.parametrize(("kind", "row"), BAD)
def test_a_hostile_row_is_dropped(tmp_path: Path, kind: str, row: Any) -> None:
    good = json.dumps(GOOD[kind])
    manifest, records = run(tmp_path, kind, [good, json.dumps(row), good])
    assert manifest["dropped"] == {BAD_JSON: 1} and len(records) == 2


def test_a_name_that_cannot_be_written_is_written_otherwise(tmp_path: Path) -> None:
    rows = [GOOD["llava"] | {"id": name} for name in (HALF, "a\nb\x1b[31m", "x" * 100_000, None, ["z"], 10**400)]
    manifest, records = run(tmp_path, "llava", [json.dumps(row) for row in rows])
    names = [record.source_id for record in records]
    assert names[0] == r"row 0 (id \ud83d)" and names[1] == r"row 1 (id a\nb\x1b[31m)" and len(names) == 6
    assert all(len(name) < 600 for name in names) and not manifest["dropped"]


@pytest.mark.parametrize(("kind", "workers"), [(kind, 1) for kind in GOOD] + [("llava", 2)])
def test_deep_rows_and_lines_that_are_no_text(
    tmp_path: Path, kind: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too deep to be parsed, to be sent to a process or to be written; half a letter; numbers beyond all bounds."""
    monkeypatch.setattr("vlm_nemo.data.prepare.pool.PARALLEL_SAMPLES", 1)
    good = json.dumps(GOOD[kind])
    deep = ['{"id": ' + "[" * n + "]" * n + "}" for n in (100, 400, 900, 100_000)]
    lines: list[str | bytes] = [good, *deep, b'{"id": "\xff', b"\x00", '{"id": ' + "9" * 10_000 + "}", good]
    manifest, records = run(tmp_path, kind, lines, workers=workers)
    assert manifest["dropped"] == {BAD_JSON: 7} and len(records) == 2


@pytest.mark.parametrize("kind", GOOD)
def test_what_the_parser_gives_up_on_is_one_row_of_a_list(tmp_path: Path, kind: str) -> None:
    good = json.dumps(GOOD[kind])
    odd = json.dumps(GOOD[kind] | {"id": 'brackets ]}, "quoted", and a \\'})
    rows = [good, DEEP, odd, '{"id": ' + "9" * 10_000 + "}", "[1, [2, 3]]", good]
    manifest, records = run(tmp_path, kind, rows, listed=True)
    assert manifest["dropped"] == {BAD_JSON: 3} and len(records) == 3


@pytest.mark.parametrize(
    "text", [f"[1, {DEEP}", f"[1, {DEEP}] 2", f'{{"a": {DEEP}}}', DEEP], ids=lambda text: text[-3:]
)
def test_a_deep_file_that_is_no_list(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=r"rows\.json cannot be read: not a list of rows"):
        read_list(tmp_path / "rows.json")


def test_numbers_beyond_a_float_are_no_facts(tmp_path: Path) -> None:
    assert facts_of({"a": 10**400, "b": 1, "c": float("nan"), "d": -float("inf"), "e" * 9999: 1}) == {"b": 1.0}
    row = json.dumps(GOOD["llava"] | {"similarity": 10**400, "n": float("nan")})
    manifest, records = run(tmp_path, "llava", [row])
    assert not manifest["dropped"] and "similarity" not in records[0].facts


def test_what_nobody_thought_of_is_a_drop() -> None:
    def make(name: str) -> Any:
        return pick_answer(["a", "a"], [10**400, 0.5])

    drop = attempt("x", make)
    assert isinstance(drop, RawDrop) and drop.reason == BAD_JSON and "OverflowError" in drop.detail


def test_printable() -> None:
    assert printable("Vögel [/x] 鳥") == "Vögel [/x] 鳥"
    assert printable("a\n\x1b\ud83d\u202e") == r"a\n\x1b\ud83d\u202e"
    assert len(printable("x" * 1000)) == 501


TEXTS = st.one_of(
    st.sampled_from(["", "<image>", "0.jpg", "../x", "a\x00b", HALF, "x" * 5000, "[/x]", "human", "gpt", "user"]),
    st.text(st.characters(), max_size=8),  # surrogates too
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.sampled_from([0, -1, 10**400]),
    TEXTS,
)
ANY = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
TURN = st.fixed_dictionaries({}, optional={"from": TEXTS | ANY, "value": TEXTS | ANY})
PARTS: dict[str, dict[str, Any]] = {
    "llava": {"id": ANY, "image": ANY, "conversations": st.lists(TURN | ANY, max_size=3) | ANY, "kind": ANY},
    "vqa": {"image": ANY, "question": TEXTS | ANY, "answer": ANY, "kind": ANY},
    "interleaved": {"images": ANY | st.lists(ANY), "texts": ANY | st.lists(ANY), "general_metadata": ANY},
}


@pytest.mark.parametrize("kind", list(GOOD))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_row_ends_prepare(tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject) -> None:
    """Rows that are nearly right, and rows that are anything; one good one, so that something is left."""
    good: dict[str, Any] = GOOD[kind]
    nearly = st.fixed_dictionaries({}, optional=PARTS[kind]).map(lambda changes: good | changes)
    rows = data.draw(st.lists(nearly | ANY | st.dictionaries(TEXTS, ANY, max_size=4), max_size=12))
    run(tmp_path_factory.mktemp("fuzz"), kind, [json.dumps(row) for row in [good, *rows]])
