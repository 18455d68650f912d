"""Whatever a caller calls an image, and OpenAI's content parts, in the engine's words. No torch here.

Every form becomes the bytes of an image file first, so that all of them meet the same limits, the same decoder and the
same resizing: pixels in memory travel as an uncompressed PNG.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vlm_nemo.data.header import read_header
from vlm_nemo.data.layout.images import plan_sizes
from vlm_nemo.data.layout.plan import ImagePlan
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.pieces import EncodedText
from vlm_nemo.data.sample import Message, SampleError
from vlm_nemo.types import IMAGE_MARKER, Images, UserError

ImageItem = Image.Image | bytes | str | Path | NDArray[np.uint8]
"""A PIL image, an encoded file's bytes, its path, a data URI, or pixels [H, W, 3] uint8."""

_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


def plan_items(items: Sequence[ImageItem], spec: ImageSpec) -> list[ImagePlan]:
    """What stands for each image in the text.

    Raises UserError for what is no image at all. One that cannot be read stands as a square does: decoding it, when
    its turn comes, says what is wrong, and ends no other prompt.
    """
    for number, item in enumerate(items):
        _check(item, number)
    return plan_sizes(spec, [_size(item, spec) for item in items])


def decode_items(items: Sequence[ImageItem], spec: ImageSpec, text: EncodedText) -> Images[NDArray[Any]]:
    """The images of a prompt whose text was made by their plans. Raises SampleError or OSError for one that cannot be
    decoded."""
    from vlm_nemo.data.image import decode_images  # with the first image: text alone needs no decoder

    return decode_images([image_bytes(item) for item in items], text, spec)


def image_bytes(item: ImageItem) -> bytes:
    """An encoded image. Raises UserError for a data URI that is none, OSError for a file that cannot be read."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, str) and item.startswith("data:"):
        return data_uri(item)
    if isinstance(item, str | Path):
        return Path(item).read_bytes()
    return _png(item if isinstance(item, Image.Image) else Image.fromarray(item))


def data_uri(uri: str) -> bytes:
    """The bytes of "data:image/png;base64,…". Raises UserError."""
    head, comma, content = uri.partition(",")
    if not comma:
        raise UserError(f"Invalid data URL {uri[:40]!r}: missing ',' separator")
    if not head.endswith(";base64"):
        raise UserError(f"Only base64 data URLs are supported for now, not {head[:40]!r}")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"a data URL is not base64: {error}") from None


def openai_messages(conversation: Sequence[Mapping[str, Any]]) -> tuple[list[Message], list[ImageItem]]:
    """Messages whose content is a text or a list of parts -> messages with markers, and the images in order.

    Parts: {"type": "text", "text"}, {"type": "image_url", "image_url": {"url": "data:…"}}, {"type": "image", "image"}.
    An image stands where its message's text has a marker; those without one come first, a line each, as in vLLM.
    Raises UserError for anything else, and for more markers than images in a message.
    """
    messages: list[Message] = []
    images: list[ImageItem] = []
    for turn in conversation:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise UserError(f"a message is {{'role': …, 'content': …}}, not {str(turn)[:60]!r}")
        content = turn.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise UserError(f"the content of a message is a text or a list of parts, not {str(content)[:60]!r}")
        texts, found = [], []
        for part in parts:
            text, image = _part(part)
            texts += [text] if text is not None else []
            found += [image] if image is not None else []
        text = "\n".join(texts)
        missing = len(found) - text.count(IMAGE_MARKER)
        if missing < 0:
            raise UserError(
                f"Found more '{IMAGE_MARKER}' placeholders in input prompt than actual multimodal data items. "
                f"(placeholders: {len(found) - missing}, images: {len(found)})"
            )
        messages.append({"role": turn["role"], "content": "\n".join([IMAGE_MARKER] * missing + [text])})
        images += found
    return messages, images


def _part(part: object) -> tuple[str | None, ImageItem | None]:
    """(text, None) or (None, image) of one content part."""
    if isinstance(part, str):
        return part, None
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind in ("text", "image_url", "image") and part.get(kind) is not None:
        value = part[kind]
        if kind == "text" and isinstance(value, str):
            return value, None
        if kind == "image":
            return None, value
        url = value.get("url") if isinstance(value, Mapping) else value
        if kind == "image_url" and isinstance(url, str):
            if not url.startswith("data:"):
                raise UserError(f"image_url must be a data: URL, not {url[:60]!r}; nothing is fetched from elsewhere")
            return None, url
    raise UserError(f"Unsupported chat content part {str(part)[:60]!r}: give text, image_url or image")


def _check(item: object, number: int) -> None:
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3:
            raise UserError(f"image {number} is an array of {item.dtype} {item.shape}; pixels are uint8 [H, W, 3]")
    elif isinstance(item, str | Path) and not str(item).startswith("data:"):
        if not Path(item).is_file():
            raise UserError(f"image {number}: there is no file {item}")
    elif not isinstance(item, Image.Image | bytes | str):
        raise UserError(
            f"image {number} is a {type(item).__name__}; give a PIL image, bytes, a path, a data URL or an array"
        )


def _size(item: ImageItem, spec: ImageSpec) -> tuple[int, int]:
    """(width, height)"""
    square = (spec.size, spec.size)
    if spec.layout.kind == "square":  # all sizes are alike: nothing is read
        return square
    try:
        header = read_header(image_bytes(item))
    except (SampleError, OSError):
        return square
    return header.width, header.height


def _png(image: Image.Image) -> bytes:
    """Upright, without loss, and quickly."""
    image = ImageOps.exif_transpose(image)
    if image.mode not in _PNG_MODES:
        image = image.convert("RGBA" if image.mode in ("RGBa", "La", "PA") else "RGB")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0)
    return file.getvalue()
