"""Whether the turns of a conversation go together, and its images with them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_nemo.data.sample import (
    BAD_JSON,
    IMAGE_WITHOUT_MARKER,
    MARKER_WITHOUT_IMAGE,
    NO_LABEL,
    Message,
    SampleError,
)
from vlm_nemo.types import IMAGE_MARKER


def count_markers(messages: Sequence[Message]) -> int:
    """Number of `<image>` in all turns."""
    return sum(message["content"].count(IMAGE_MARKER) for message in messages)


def check_images(messages: Sequence[Message], images: int) -> None:
    """Raises SampleError if the number of `<image>` differs from the number of images."""
    markers = count_markers(messages)
    if markers != images:
        reason = IMAGE_WITHOUT_MARKER if markers < images else MARKER_WITHOUT_IMAGE
        raise SampleError(reason, f"{markers} {IMAGE_MARKER} in the text, {images} images")


def check_turns(messages: Sequence[Message]) -> None:
    """Raises SampleError if the roles do not take turns, or an assistant turn is empty or there is none."""
    check_roles(messages)
    # Images in an answer (of documents) are context like any other; an answer needs a word of its own
    answers = [m["content"].replace(IMAGE_MARKER, "") for m in messages if m["role"] == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        raise SampleError(NO_LABEL, "no assistant turn" if not answers else "an assistant turn is empty")


def check_roles(messages: Sequence[Message]) -> None:
    """Raises SampleError unless, behind a system message, user and assistant take turns."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * ((len(turns) + 1) // 2)
    if not turns or turns != expected[: len(turns)]:
        raise SampleError(BAD_JSON, f"turns must go user, assistant, user, …, not {', '.join(roles) or 'none'}")
