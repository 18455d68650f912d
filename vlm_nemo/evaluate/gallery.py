"""What a person looks at after an evaluation: a page and a contact sheet of images with question, answer and truth."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm_nemo.evaluate.vqa import Answered, Scores

_STYLE = """
body{font:15px/1.4 system-ui,sans-serif;margin:2rem;max-width:75rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem}
figure{margin:0;padding:.8rem;border:1px solid #ddd;border-radius:.5rem}
img{width:48%;image-rendering:pixelated;border-radius:.25rem}
.one{width:100%}.right{color:#176b2c}.wrong{color:#b3261e}.kind{color:#777;font-size:.85em}
"""


def choose(records: Sequence[Answered], count: int) -> list[Answered]:
    """The first questions with an image of every kind in turn: what is shown is not chosen by how it was answered."""
    by_kind: dict[str, list[Answered]] = defaultdict(list)
    for record in records:
        if record.question.images:
            by_kind[record.question.kind].append(record)
    chosen: list[Answered] = []
    depth = 0
    while len(chosen) < count and any(len(found) > depth for found in by_kind.values()):
        chosen += [found[depth] for _, found in sorted(by_kind.items()) if len(found) > depth]
        depth += 1
    return chosen[:count]


def question_text(record: Answered) -> str:
    """The last thing that the user asked, image markers left out."""
    return record.question.messages[-1]["content"].replace("<image>", "").strip() or "(describe)"


def write_gallery(path: Path, records: Sequence[Answered], scores: Scores, title: str) -> None:
    """One self-contained page: the table of scores, then the images."""
    rows = "".join(
        f"<tr><td>{html.escape(kind)}</td><td>{scores.n[kind]}</td><td>{scores.accuracy[kind]:.1%}</td>"
        f"<td>{scores.chance[kind]:.1%}</td><td>{_percent(scores.swapped.get(kind))}</td></tr>"
        for kind in scores.accuracy
    )
    figures = "".join(_figure(record) for record in records)
    path.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<meta name=viewport content='width=device-width'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p>Images that training never saw.</p>"
        "<table><tr><th>kind<th>questions<th>right<th>chance<th>right with swapped images</tr>"
        f"{rows}</table><div class=grid>{figures}</div></html>\n",
        encoding="utf-8",
    )


def _figure(record: Answered) -> str:
    images = "".join(
        f"<img class={'one' if len(record.question.images) == 1 else 'two'} alt='' "
        f"src='data:{_mime(data)};base64,{base64.b64encode(data).decode()}'>"
        for data in record.question.images
    )
    verdict = "right" if record.correct else "wrong"
    truth = "" if record.correct else f"<div>truth: {html.escape(record.question.truth)}</div>"
    return (
        f"<figure>{images}<figcaption><div class=kind>{html.escape(record.question.kind)}</div>"
        f"<div>{html.escape(question_text(record))}</div>"
        f"<div class={verdict}><b>{html.escape(record.answer) or '(nothing)'}</b></div>{truth}</figcaption></figure>"
    )


def write_contact_sheet(path: Path, records: Sequence[Answered], columns: int = 6, side: int = 200) -> None:
    """A PNG of the questions with their images and text: the answer green where right, red beside the truth if not."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    text_height, gap = 84, 14
    columns = min(columns, max(1, len(records)))
    lines = -(-max(1, len(records)) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, lines * (side + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, record in enumerate(records):
        x = gap + (i % columns) * (side + gap)
        y = gap + (i // columns) * (side + text_height + gap)
        count = len(record.question.images)
        each = (side - 4 * (count - 1)) // count
        draw.rectangle((x, y, x + side - 1, y + side - 1), fill="#eeeeee")
        for j, data in enumerate(record.question.images):
            picture = Image.open(io.BytesIO(data)).convert("RGB").resize((each, each), Image.Resampling.NEAREST)
            sheet.paste(picture, (x + j * (each + 4), y + (side - each) // 2))
        draw.text((x, y + side + 4), record.question.kind, fill="#888888", font=small)
        below = y + side + 20
        for line in textwrap.wrap(question_text(record), 27)[:2]:
            draw.text((x, below), line, fill="#222222", font=font)
            below += 18
        said = record.answer or "(nothing)"
        colour = "#176b2c" if record.correct else "#b3261e"
        draw.text((x, below), said if record.correct else f"{said}  ({record.question.truth})", fill=colour, font=font)
    sheet.save(path)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _mime(data: bytes) -> str:
    if data[:2] == b"\xff\xd8":
        return "image/jpeg"
    if data[:4] == b"RIFF":
        return "image/webp"
    return "image/gif" if data[:3] == b"GIF" else "image/png"
