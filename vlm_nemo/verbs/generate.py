"""`vlm-nemo generate`: one question, with or without images, to a checkpoint."""

from __future__ import annotations

from pathlib import Path

from vlm_nemo.config import GenerateRoot
from vlm_nemo.data.chat import count_markers, encode_prompt
from vlm_nemo.data.sample import Message
from vlm_nemo.evaluate.vqa import stack_images
from vlm_nemo.infer.engine import Request
from vlm_nemo.runtime import device, groups
from vlm_nemo.train import checkpoint
from vlm_nemo.types import IMAGE_MARKER, UserError
from vlm_nemo.verbs.common import Loaded, inference_layout, set_up_logging


def generate(cfg: GenerateRoot) -> None:
    """Print the answer. Without any `<image>` in the prompt the images come first, a line each."""
    images = [_read(path) for path in cfg.image]
    prompt = cfg.prompt
    if images and IMAGE_MARKER not in prompt:
        prompt = f"{IMAGE_MARKER}\n" * len(images) + prompt
    messages: list[Message] = [{"role": "user", "content": prompt}]
    if count_markers(messages) != len(images):
        raise UserError(
            f"the prompt has {count_markers(messages)} {IMAGE_MARKER} and {len(images)} images were given; "
            "they must be equal"
        )
    with device.adapter():
        layout = inference_layout(cfg.parallel)
        ranks = groups.start(layout, seed=0)
        set_up_logging(ranks.rank)
        assert cfg.checkpoint.load is not None  # the verb requires it
        loaded = Loaded(checkpoint.find(cfg.checkpoint.load), layout, cfg.precision, ranks)
        tokens = encode_prompt(messages, loaded.tokenizer, loaded.template, [loaded.spec.tokens] * len(images))
        request = Request(tokens=tokens, images=lambda: stack_images(images, loaded.spec))
        (answer,) = loaded.engine.generate([request], cfg.infer.max_new_tokens)
        if ranks.main:
            print(loaded.tokenizer.decode(answer).strip())
        groups.stop()


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"image={path} cannot be read: {error.strerror}") from None
