"""Text to token ids and back: the `tokenizers` library behind the few words that the rest needs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from vlm_nemo.data.layout.plan import NAME
from vlm_nemo.data.sample import SPECIAL_TOKEN, SampleError, check_text
from vlm_nemo.types import IMAGE_MARKER, UserError

NEEDED = ("tokenizer.json", "tokenizer_config.json")
KEPT = (*NEEDED, "special_tokens_map.json", "chat_template.jinja", "tokenizer.model")
"""What `save` takes along where it exists, so that AutoTokenizer reads the copy as it read the origin."""
IMAGE_TOKENS = ("<image>", "<|image_pad|>", "<IMG_CONTEXT>", "<IMG_ATOM>", "<image_soft_token>", "<|image|>")
"""The families' names for a placeholder, where tokenizer_config.json does not say image_token."""


class Tokenizer:
    """A folder with tokenizer.json and tokenizer_config.json, as Hugging Face's fast tokenizers are saved.

    Text never becomes a special token: every added token of the file is treated as special, and special tokens are
    not recognised inside text. They enter a sequence only by their ids, from `vlm_nemo.data.chat`.
    """

    bos_id: int | None
    """None: sequences begin without one (Qwen)."""
    eos_id: int
    pad_id: int
    image_id: int
    vocab_size: int
    """Highest id + 1, added tokens included: the embedding needs at least this many rows."""
    longest_token: int
    """Bytes; no token of a text stands for more."""
    special_ids: frozenset[int]
    """Every added token: `encode` never yields one, `decode` skips them."""

    def __init__(self, folder: str | Path) -> None:
        """Raises UserError if a file or one of the tokens eos, pad, <image> is missing."""
        self.folder = Path(folder)
        for name in NEEDED:
            if not (self.folder / name).is_file():
                raise UserError(
                    f"data.tokenizer={self.folder} has no {name}; give a folder of Hugging Face's fast tokenizers "
                    "or by `vlm-nemo prepare … tokenizer_vocab=N`"
                )
        content = _read_json(self.folder / "tokenizer.json")
        names = _special_names(_read_json(self.folder / "tokenizer_config.json"))
        for token in content.get("added_tokens") or []:
            token["special"] = True
        try:
            self._fast = FastTokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{self.folder / 'tokenizer.json'} is not a tokenizer of this library: {error}") from error
        self._fast.encode_special_tokens = True
        self._fast.no_truncation()
        self._fast.no_padding()

        added = {token["content"] for token in content.get("added_tokens") or []}
        if not names["image"]:
            names["image"] = next((name for name in IMAGE_TOKENS if name in added), IMAGE_MARKER)
        ids: dict[str, int] = {}
        missing = []
        for role, name in names.items():
            if role == "bos" and not name:
                continue
            token_id = self._fast.token_to_id(name) if name in added else None
            if token_id is None:
                missing.append(f"{role} ({name or 'not named'})")
            else:
                ids[role] = token_id
        if missing:
            raise UserError(
                f"tokenizer {self.folder} has no special token for {', '.join(missing)}; take OUT/tokenizer of "
                "`vlm-nemo convert hf=… out=OUT`, which adds <image> and <pad>, or add it to added_tokens of "
                "tokenizer.json and name it in tokenizer_config.json"
            )
        self.bos_id = ids.get("bos")
        self.eos_id, self.pad_id, self.image_id = ids["eos"], ids["pad"], ids["image"]
        self.special_ids = frozenset(
            token_id for token_id, token in self._fast.get_added_tokens_decoder().items() if token.special
        )
        vocabulary = self._fast.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.longest_token = max(len(token.encode()) for token in vocabulary)
        self._control = frozenset((self.bos_id, self.eos_id, self.image_id))
        self._names = {name: token_id for name in added if (token_id := self._fast.token_to_id(name)) is not None}
        longest_first = sorted(self._names, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        # SentencePiece-style files put a space before whatever they are given ("a" and " a" differ by one token more).
        self._prepends_space = self._fast.encode("a", add_special_tokens=False).tokens[:1] == ["▁a"]

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of `text`, no special tokens among them.

        continues: the text goes on where earlier text ended; then a tokenizer that puts a space before everything
            replaces the text's own leading space instead of adding a second one.
        Raises SampleError for a text that holds half a surrogate pair, or that becomes a special token.
        """
        if continues and self._prepends_space and text.startswith(" "):
            text = text[1:]
        try:
            ids = self._fast.encode(text, add_special_tokens=False).ids
        except TypeError:  # what the library says to a text that UTF-8 cannot say
            check_text(text)
            raise
        if not self._control.isdisjoint(ids):
            raise SampleError(SPECIAL_TOKEN, f"text {text[:40]!r} becomes a special token with this tokenizer")
        return ids

    @property
    def names(self) -> frozenset[str]:
        """Of the added tokens."""
        return frozenset(self._names)

    def special(self, name: str) -> int:
        """The id of an added token. Raises UserError if there is none of that name."""
        if name not in self._names:
            raise UserError(
                f"tokenizer {self.folder} has no special token {name}, which the template or model.layout puts into "
                "every conversation; add it to added_tokens of tokenizer.json, or choose another template or layout"
            )
        return self._names[name]

    def split(self, text: str) -> tuple[str | int, ...]:
        """A text of ours, never a user's: "<|im_start|>user\\n" -> (151644, "user\\n").

        Raises UserError where a name in angle brackets is no special token.
        """
        return _split(self, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are skipped."""
        return self._fast.decode(list(ids), skip_special_tokens=True)

    def same_as(self, folder: str | Path) -> bool:
        """Whether `folder` holds the same tokenizer: its ids mean the same."""
        other = Path(folder) / "tokenizer.json"
        return other.is_file() and _read_json(other) == _read_json(self.folder / "tokenizer.json")

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files to `folder`."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, target / name)


@lru_cache(maxsize=1024)  # a function's, not a method's: templates and layouts have few texts
def _split(tokenizer: Tokenizer, text: str) -> tuple[str | int, ...]:
    pieces: list[str | int] = []
    for piece in tokenizer._split.split(text):
        if piece in tokenizer._names:
            pieces.append(tokenizer._names[piece])
        elif piece:
            for name in NAME.findall(piece):
                tokenizer.special(name)
            pieces.append(piece)
    return tuple(pieces)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _special_names(config: dict[str, Any]) -> dict[str, str]:
    """{"bos": "<s>", ...} from tokenizer_config.json, where a token is a string or {"content": string}."""
    names = {}
    for role in ("bos", "eos", "pad", "image"):
        value = config.get(f"{role}_token")
        if isinstance(value, dict):
            value = value.get("content")
        names[role] = value or ""
    return names
