"""What flows between the files of this package: messages, a record of a shard, an encoded sample, a drop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from vlm_nemo.types import Images, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Why a sample is left out. Short and stable: they are the keys of ledger.json and of a source's manifest.json.
MISSING_IMAGE = "missing image"
BROKEN_IMAGE = "broken image"
IMAGE_SIZE = "image size"
IMAGE_WITHOUT_MARKER = "image without <image>"
MARKER_WITHOUT_IMAGE = "<image> without an image"
EMPTY_CAPTION = "empty caption"
TOO_LONG = "too long"
NO_LABEL = "no label"
BAD_JSON = "bad json"
SPECIAL_TOKEN = "special token in text"
WRONG_LENGTH = "wrong length"
FILTERED = "filtered"
DUPLICATE = "duplicate"
REASONS = (
    MISSING_IMAGE,
    BROKEN_IMAGE,
    IMAGE_SIZE,
    IMAGE_WITHOUT_MARKER,
    MARKER_WITHOUT_IMAGE,
    EMPTY_CAPTION,
    TOO_LONG,
    NO_LABEL,
    BAD_JSON,
    SPECIAL_TOKEN,
    WRONG_LENGTH,
    FILTERED,
    DUPLICATE,
)
UNWANTED = (FILTERED, DUPLICATE)
"""Left out because the user asked for it: no fault of the data, and not counted as bad."""


class SampleError(UserError):
    """This sample cannot be used. The loader counts it by `reason` and goes on; elsewhere it is the user's error."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class NothingUsable(UserError):
    """So many samples one after the other had to be dropped that the data, not a sample, is wrong."""

    def __init__(self, words: str, drops: Sequence[Drop] = ()) -> None:
        """drops: those that no step accounts for."""
        super().__init__(words)
        self.drops = list(drops)


def check_text(*texts: str) -> None:
    """Raises SampleError ("bad json") for a text that UTF-8 cannot say: JSON can hold half a surrogate pair."""
    for text in texts:
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError as error:
            raise SampleError(BAD_JSON, f"half a surrogate pair at letter {error.start} of a text") from None


def printable(text: str, longest: int = 500) -> str:
    """What may be shown and written of a text that anybody may have made: one line, no control characters, not long."""
    text = text if len(text) <= longest else text[:longest] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class Message(TypedDict):
    """One turn of a conversation; `<image>` in the content stands for the next image."""

    role: str
    """system | user | assistant"""
    content: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record of a prepared shard, without the bytes of its images."""

    messages: list[Message]
    kind: str | None
    """Group of the question, where the dataset knows one."""
    source_id: str
    """The sample's name in the raw data."""
    sizes: list[tuple[int, int]]
    """Width and height of each image, pixels, as it is shown (EXIF rotation applied)."""
    facts: dict[str, float | str] = field(default_factory=dict)
    """What the raw data said about it: similarity, language, …"""


class ShardImage(NamedTuple):
    """An image to write."""

    data: bytes
    extension: str
    width: int
    height: int


class ShardSample(NamedTuple):
    """A sample to write."""

    key: str
    """Without dots."""
    messages: list[Message]
    kind: str | None
    source_id: str
    images: list[ShardImage]
    facts: Mapping[str, float | str] = {}
    """What the raw data says about it; written beside the messages."""


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """A sample ready to be packed."""

    tokens: Sequence[int]
    labels: Sequence[int]
    """Not shifted: labels[t] is tokens[t] or IGNORE_INDEX."""
    images: Images[NDArray[Any]]
    positions: NDArray[np.int64] | None = None
    """[3, T] where M-RoPE counts an image's rows and columns; None = 0, 1, 2, … three times."""
    image_keys: tuple[bytes, ...] = ()
    """Hashes of the encoded images, where features are kept."""
    decode: Callable[[], Images[NDArray[Any]]] | None = None
    """The images with their patches, where these were left out because the images' features are known."""


class Drop(NamedTuple):
    """A sample that was left out."""

    source: str
    reason: str
    key: str
    """Shard and member, as `tar` lists it, with the raw data's name where it is known."""
