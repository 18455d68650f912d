"""Messages to what the engine takes: token ids with placeholders, and the images as arrays.

The images of a message come first, a line each, then its texts, a line each: as vLLM's chat does and as LLaVA was
trained. Decoding happens here, in a thread of the server, so that a large picture does not hold up other answers.

`vlm_nemo.infer.images` reads the same parts of a caller in this process, who may name files and put markers into the
text. A client may do neither, and is told with a status what is wrong: hence a second reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.data.chat import encode_prompt
from vlm_nemo.data.header import MAX_PIXELS
from vlm_nemo.data.image import decode_images, plan_images
from vlm_nemo.data.layout.plan import ImagePlan
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.pieces import EncodedText
from vlm_nemo.data.sample import Message, SampleError
from vlm_nemo.infer.sampling import SamplingParams
from vlm_nemo.serve import schema
from vlm_nemo.serve.config import ServeConfig
from vlm_nemo.serve.errors import bad_request, not_found
from vlm_nemo.serve.images import ImageLimits, read_data_uri
from vlm_nemo.serve.schema import ChatMessage, ChatRequest
from vlm_nemo.types import IMAGE_MARKER, Images

if TYPE_CHECKING:
    from vlm_nemo.infer.load import LoadedModel

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request that the engine can start on."""

    tokens: tuple[int, ...]
    images: Images[NDArray[Any]] | None
    positions: NDArray[np.int64] | None
    """Of M-RoPE, see `vlm_nemo.infer.request.Prompt`."""
    params: SamplingParams

    @property
    def image_tokens(self) -> int:
        """How many of `tokens` are placeholders."""
        return 0 if self.images is None else len(self.images.slots)


def prepare(request: ChatRequest, model: LoadedModel, name: str, cfg: ServeConfig) -> Prepared:
    """Everything about a request that can be wrong is found here. Raises APIError (400, 404)."""
    if request.model is not None and request.model != name:
        raise not_found(f"The model `{request.model[:100]}` does not exist; this server has `{name}`.", "model")
    messages, files = read_messages(request.messages, cfg)
    context = model.engine.backend.capacity
    # Before it is tokenised, which takes seconds for megabytes: no token stands for more bytes than the longest does
    if (size := sum(len(m["content"].encode()) for m in messages)) > context * model.tokenizer.longest_token:
        raise bad_request(
            f"This model's maximum context length is {context} tokens. However, your messages have {size} bytes of "
            "text, which are more tokens than that. Please reduce the length of the messages.",
            "input_tokens",
        )
    plans = _plans(files, model.spec)
    try:
        text = encode_prompt(messages, model.tokenizer, model.template, plans)
    except SampleError as error:
        raise bad_request(error.detail, "messages") from None
    params = schema.sampling(
        request,
        prompt_tokens=len(text.tokens),
        context=context,
        choices=cfg.max_choices,
        logprobs=cfg.max_logprobs,
    )
    return Prepared(
        tokens=tuple(text.tokens),
        images=decode(files, text, model.spec),
        positions=text.positions,
        params=params,
    )


def read_messages(messages: Sequence[ChatMessage], cfg: ServeConfig) -> tuple[list[Message], list[bytes]]:
    """Turns with a marker for each image, and the images' bytes in the same order. Raises APIError (400)."""
    parts = [part for m in messages if isinstance(m.content, list) for part in m.content]
    if sum(part.type == "image_url" for part in parts) > cfg.max_images:
        raise bad_request(f"At most {cfg.max_images} image(s) may be provided in one prompt.", "image")
    limits = ImageLimits(bytes=cfg.max_image_bytes, pixels=min(cfg.max_pixels, MAX_PIXELS))
    turns: list[Message] = []
    files: list[bytes] = []
    for message in messages:
        if message.role not in ROLES:
            raise bad_request(f"role must be one of {', '.join(ROLES)}, not {message.role[:40]!r}.", "messages")
        texts, found = _content(message, limits)
        if any(IMAGE_MARKER in text for text in texts):
            raise bad_request(
                f"Found more '{IMAGE_MARKER}' placeholders in input prompt than actual multimodal data items.",
                "messages",
            )
        turns.append({"role": message.role, "content": "\n".join([IMAGE_MARKER] * len(found) + texts)})
        files += found
    return turns, files


def _content(message: ChatMessage, limits: ImageLimits) -> tuple[list[str], list[bytes]]:
    """The texts and the image files of one message."""
    if message.content is None:
        if message.role != "assistant":
            raise bad_request(f"a message of role {message.role} needs content.", "messages")
        return [], []
    if isinstance(message.content, str):
        return [message.content], []
    texts, files = [], []
    for part in message.content:
        if part.type == "text" and part.text is not None:
            texts.append(part.text)
        elif part.type == "image_url" and part.image_url is not None:
            if message.role != "user":
                raise bad_request(f"images belong to messages of role user, not {message.role}.", "messages")
            url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
            files.append(read_data_uri(url, limits))
        elif part.type in ("text", "image_url"):
            raise bad_request(f"a content part of type {part.type} needs the field {part.type}.", "messages")
        else:
            raise bad_request(f"Unsupported chat content part type: {part.type[:40]!r}.", "messages")
    return texts, files


def _plans(files: Sequence[bytes], spec: ImageSpec) -> list[ImagePlan]:
    """Raises APIError (400) for a file whose header is damaged."""
    try:
        return plan_images(files, spec)
    except SampleError as error:
        raise bad_request(f"Failed to load image: {error.detail}", "image_url") from None


def decode(files: Sequence[bytes], text: EncodedText, spec: ImageSpec) -> Images[NDArray[Any]] | None:
    """None without images. Raises APIError (400) for a file whose pixels are damaged."""
    if not files:
        return None
    try:
        return decode_images(files, text, spec)
    except SampleError as error:
        raise bad_request(f"Failed to load image: {error.detail}", "image_url") from None
