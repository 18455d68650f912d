"""`vlm-nemo generate`: one question, with or without images, to a model."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from vlm_nemo.config import GenerateRoot
from vlm_nemo.data.chat import encode_prompt
from vlm_nemo.data.sample import Message
from vlm_nemo.data.turns import count_markers
from vlm_nemo.infer import replicas
from vlm_nemo.infer.config import InferConfig
from vlm_nemo.infer.images import decode_items, plan_items
from vlm_nemo.infer.load import open_model
from vlm_nemo.infer.prompts import prompt_of
from vlm_nemo.infer.request import Answer
from vlm_nemo.infer.sampling import SamplingParams
from vlm_nemo.types import IMAGE_MARKER, UserError
from vlm_nemo.verbs.common import set_up_logging


def generate(cfg: GenerateRoot) -> None:
    """Print the answer; where it is empty, why, on stderr.

    Without any `<image>` in the prompt the images come first, a line each.
    """
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
    set_up_logging(int(os.environ.get("RANK", "0")))
    model = open_model(
        checkpoint=cfg.checkpoint.load,
        hf=cfg.hf,
        export=cfg.export,
        infer=cfg.infer,
        parallel=cfg.parallel,
        precision=cfg.precision,
    )
    text = encode_prompt(messages, model.tokenizer, model.template, plan_items(images, model.spec))
    asked = prompt_of(text, partial(decode_items, images, model.spec))
    room = max(1, model.engine.backend.capacity - len(asked.tokens))
    (output,) = replicas.generate(model, [asked], sampling_of(cfg.infer, room))
    (answer,) = output.outputs
    if answer.finish_reason == "error":
        raise UserError(f"no answer: {answer.error}")
    if model.ranks is None or model.ranks.main:
        print(answer.text.strip())
        if why := silence(answer):
            print(why, file=sys.stderr)
    model.close()


def silence(answer: Answer) -> str | None:
    """Why there is nothing to read, where there is not."""
    if answer.text.strip():
        return None
    if len(answer.token_ids) == 1 and answer.finish_reason == "stop":
        return "the model answered nothing: its first token ended the text"
    return f"the model answered nothing that can be read: {len(answer.token_ids)} tokens, blank or special ones only"


def sampling_of(cfg: InferConfig, room: int) -> SamplingParams:
    """What the command line asks of one answer; room: tokens that the prompt leaves."""
    return SamplingParams(
        max_tokens=min(cfg.max_new_tokens, room),
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        top_k=cfg.top_k,
        seed=cfg.seed,
    )


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"image={path} cannot be read: {error.strerror}") from None
