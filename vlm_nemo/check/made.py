"""Conversations about made-up images, put through the real template, layout and packer: what parity and leaks look at.

The tokenizer knows bytes and the special tokens that template and layout want, so that a tiny vocabulary takes any of
them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlm_nemo.data.chat import TEMPLATES, Template, encode_conversation
from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.image import decode_images, plan_images
from vlm_nemo.data.layout.images import plan_image
from vlm_nemo.data.layout.plan import NAME, ImagePlan
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.packing import pack_batch
from vlm_nemo.data.sample import EncodedSample, Message
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.types import IMAGE_MARKER, PackedBatch

SPECIAL = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "image": IMAGE_MARKER}
STEP = 16
"""Rows and vocabularies are multiples of it: every layout of the rehearsal divides them."""
INIT_STD = 0.1
"""Weights so large that what one token does to another stands out of the rounding."""
SHAPES = ((1.0, 1.0), (2.2, 1.0), (1.0, 1.6))
"""Width and height of the images, in sides of the model's square view."""


class Conversation(NamedTuple):
    """A sample before the template."""

    messages: list[Message]
    images: list[bytes]
    """PNG"""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model small enough to be trained here, and the words that it is asked in."""

    model: ModelConfig
    optim: OptimConfig
    """Whose parts without a rate are frozen."""
    template: str
    tokenizer: str
    """Folder of a byte tokenizer."""

    def samples(self) -> list[EncodedSample]:
        """None, one or several images, short and long answers: the same on every process."""
        tokenizer, spec = Tokenizer(self.tokenizer), spec_of(self.model)
        return [encoded(one, tokenizer, TEMPLATES[self.template], spec) for one in conversations(spec.size)]

    @property
    def pad_id(self) -> int:
        return Tokenizer(self.tokenizer).pad_id

    @property
    def image_id(self) -> int:
        return Tokenizer(self.tokenizer).image_id


def subject(twin: ModelConfig, optim: OptimConfig, template: str, folder: Path) -> Subject:
    """twin: a shrunk model; its vocabulary becomes that of the tokenizer, which is written to `folder`."""
    spec = spec_of(twin)
    plans = [plan_image(spec, size) for size in image_sizes(spec.size)]
    tokenizer = byte_tokenizer(folder, names_in(TEMPLATES[template], twin.layout, plans))
    vocabulary = -(-tokenizer.vocab_size // STEP) * STEP
    longest = max(twin.language.max_positions, 1 << 15)
    language = replace(twin.language, vocab_size=vocabulary, max_positions=longest)
    return Subject(
        model=replace(twin, language=language, init_std=INIT_STD),
        optim=optim,
        template=template,
        tokenizer=str(folder),
    )


def names_in(template: Template, layout: LayoutConfig, plans: Iterable[ImagePlan]) -> list[str]:
    """Special tokens that a template and images put into a conversation."""
    texts = [value for value in asdict(template).values() if isinstance(value, str)]
    texts += [layout.before, layout.after]
    names: list[str] = []
    for plan in plans:
        texts += [item for item in plan.items if isinstance(item, str)]
        names += [item.token for item in plan.items if not isinstance(item, str) and item.token]
    names += [name for text in texts for name in NAME.findall(text)]
    return sorted(set(names) - set(SPECIAL.values()))


def byte_tokenizer(folder: Path, names: Sequence[str]) -> Tokenizer:
    """A tokenizer of bytes, without merges, and these special tokens; written to `folder`."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    special = [*SPECIAL.values(), *names]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    config = {f"{role}_token": name for role, name in SPECIAL.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer(folder)


def image_sizes(side: int) -> list[tuple[int, int]]:
    """(width, height), pixels, for a model that sees squares of `side`."""
    return [(round(width * side), round(height * side)) for width, height in SHAPES]


def conversations(side: int) -> list[Conversation]:
    """Eight of them. Images are spread unevenly, half of the samples have none; a long answer stands beside short
    ones, so that a mean over rows is no mean over tokens."""
    rng = np.random.default_rng(0)
    pictures = (3, 0, 0, 0, 1, 2, 0, 1)
    answers = (3, 1, 24, 2, 5, 1, 12, 8)
    sizes = image_sizes(side)
    made = []
    for number, (images, words) in enumerate(zip(pictures, answers, strict=True)):
        messages: list[Message] = [] if number == 1 else [{"role": "system", "content": "Look."}]
        messages.append({"role": "user", "content": IMAGE_MARKER * images + _text(rng, 3 + number)})
        messages.append({"role": "assistant", "content": _text(rng, words)})
        if number % 3 == 2:
            messages.append({"role": "user", "content": _text(rng, 4)})
            messages.append({"role": "assistant", "content": _text(rng, 2)})
        made.append(Conversation(messages, [_picture(rng, sizes[(number + i) % len(sizes)]) for i in range(images)]))
    return made


ROWS = ((0, 1), (2, 3), (4, 5), (6, 7))
"""Which conversations share a row: one with most of the images, one without any."""


def packed_rows(samples: Sequence[EncodedSample], pad_id: int, patch: int, rows_at_once: int = 1) -> list[PackedBatch]:
    """The samples packed as ROWS says, every row with some padding; several of these rows in one batch."""
    capacity = row_length(samples)
    joined = [sum(ROWS[i : i + rows_at_once], ()) for i in range(0, len(ROWS), rows_at_once)]
    return [pack_batch([samples[i] for i in row], capacity * rows_at_once, pad_id, patch) for row in joined]


def padded_rows(samples: Sequence[EncodedSample], pad_id: int, patch: int) -> list[PackedBatch]:
    """Every sample in a row of its own, as long as the packed ones."""
    return [pack_batch([sample], row_length(samples), pad_id, patch) for sample in samples]


def row_length(samples: Sequence[EncodedSample]) -> int:
    """Tokens of a row: the fullest, and some padding."""
    longest = max(sum(len(samples[i].tokens) for i in row) for row in ROWS)
    return (longest // STEP + 1) * STEP


def encoded(one: Conversation, tokenizer: Tokenizer, template: Template, spec: ImageSpec) -> EncodedSample:
    """As the loader does it."""
    text = encode_conversation(one.messages, tokenizer, template, plan_images(one.images, spec))
    images = decode_images(one.images, text, spec)
    return EncodedSample(tokens=text.tokens, labels=text.labels, images=images, positions=text.positions)


def _text(rng: np.random.Generator, words: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(rng.choice(list(letters), size=3)) for _ in range(words))


def _picture(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(file, format="PNG")
    return file.getvalue()
