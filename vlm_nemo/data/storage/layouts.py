"""How the members of a plain tar's sample become messages and images: img2dataset's way, energon's way."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from vlm_nemo.data.raw.energon import EnergonMeta, energon_sample
from vlm_nemo.data.raw.messages import caption_messages
from vlm_nemo.data.sample import BAD_JSON, MISSING_IMAGE, Message, SampleError
from vlm_nemo.data.storage.shards import is_message
from vlm_nemo.data.turns import check_images, check_turns

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Members that may be a sample's image, the first of them that is there."""
_NUMBERED = re.compile(rf"(\d+)\.(?:{'|'.join(IMAGES)})")
TEXTS = ("txt", "json", "cls")


class Text(NamedTuple):
    """What a sample says."""

    messages: list[Message]
    kind: str | None
    source_id: str


class Layout(Protocol):
    """What to look for in a sample. Members go by their extension, in lower case."""

    @property
    def name(self) -> str:
        """All that an index depends on besides the tar."""
        ...

    def texts(self, extensions: Sequence[str]) -> list[str]:
        """Those of a sample's members that `text` needs."""
        ...

    def images(self, extensions: Sequence[str]) -> list[str]:
        """Those of a sample's members that are its images, in order."""
        ...

    def text(self, contents: Mapping[str, bytes], images: Sequence[str]) -> Text:
        """contents: the bytes of `texts`; images: the extensions of `images`. Raises SampleError."""
        ...


class WebDataset:
    """An image, and as its caption txt, else json's "caption", else cls; or json with messages and 0.jpg, 1.jpg, …"""

    name = "webdataset"

    def texts(self, extensions: Sequence[str]) -> list[str]:
        return [extension for extension in TEXTS if extension in extensions]

    def images(self, extensions: Sequence[str]) -> list[str]:
        single = next((extension for extension in IMAGES if extension in extensions), None)
        if single is not None:
            return [single]
        numbered = [match for match in map(_NUMBERED.fullmatch, extensions) if match]
        return [match[0] for match in sorted(numbered, key=lambda match: int(match[1]))]

    def text(self, contents: Mapping[str, bytes], images: Sequence[str]) -> Text:
        facts, caption = None, None
        try:
            facts = json.loads(contents.get("json", b"{}"))
            messages = facts.get("messages")
            if "txt" in contents:
                caption = contents["txt"].decode()
            elif facts.get("caption") is None and "cls" in contents:
                caption = contents["cls"].decode()
            else:
                caption = facts.get("caption")
        except (ValueError, AttributeError, RecursionError) as error:
            raise SampleError(BAD_JSON, str(error)) from None
        if messages is None:
            found = caption_messages(caption if isinstance(caption, str) else "")
            if not images:
                raise SampleError(MISSING_IMAGE, f"members: {', '.join(contents)}")
        elif isinstance(messages, list) and messages and all(map(is_message, messages)):
            found = messages
        else:
            raise SampleError(BAD_JSON, "messages is not a list of {role, content}")
        check_images(found, len(images))
        kind, source_id = facts.get("kind"), facts.get("source_id")
        return Text(found, None if kind is None else str(kind), "" if source_id is None else str(source_id))


class Energon:
    """As a folder's .nv-meta says."""

    def __init__(self, meta: EnergonMeta) -> None:
        self._meta = meta
        self.name = repr((meta.sample_type, sorted(meta.field_map.items())))

    def texts(self, extensions: Sequence[str]) -> list[str]:
        wanted = self._meta.members - set(self.images(extensions))
        return [extension for extension in extensions if extension in wanted]

    def images(self, extensions: Sequence[str]) -> list[str]:
        options = [option[0] for option in self._meta.field_map.get("image", ()) if len(option) == 1]
        return [option for option in options if option in extensions][:1]

    def text(self, contents: Mapping[str, bytes], images: Sequence[str]) -> Text:
        messages, found = energon_sample(self._meta, {**dict.fromkeys(images, b""), **contents})
        check_images(messages, len(found))
        check_turns(messages)
        return Text(messages, None, "")
