"""The same conversation for transformers' class and for ours: one set of token ids, one set of pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tests.weights.published import hf_tensors
from vlm_nemo.data.chat import TEMPLATES, Template, encode_conversation
from vlm_nemo.data.image import decode_images, plan_images
from vlm_nemo.data.sample import EncodedSample, Message
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.boxes import local_parameters
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.weights.families import FAMILIES
from vlm_nemo.weights.parity import hf_inputs
from vlm_nemo.weights.tables import naming_of

Sizes = list[tuple[int, int]]
SIZES: dict[str, Sizes] = {"none": [], "one": [(37, 23)], "two": [(21, 41), (50, 30)]}
"""Width and height of the images of a conversation: odd ones."""


def sizes_of(cfg: ModelConfig) -> dict[str, Sizes]:
    """The same for a family's twin; of tiles of 8 pixels such that images have one, two and three of four."""
    if cfg.vision.tiles is None:
        return SIZES
    return {"none": [], "one": [(15, 8)], "two": [(8, 8), (8, 19)]}


def png(width: int, height: int, seed: int) -> bytes:
    """A random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


def template_of(cfg: ModelConfig) -> Template:
    return TEMPLATES[FAMILIES[cfg.family].template]


def sample(cfg: ModelConfig, words: Tokenizer, sizes: Sequence[tuple[int, int]]) -> EncodedSample:
    """A conversation about images of these sizes, encoded by ours."""
    spec = spec_of(cfg)
    files = [png(*size, seed) for seed, size in enumerate(sizes)]
    question: Message = {"role": "user", "content": "<image>\n" * len(files) + "What colour is the star?"}
    messages = [question, Message(role="assistant", content="It is red, and a blue ring.")]
    text = encode_conversation(messages, words, template_of(cfg), plan_images(files, spec))
    images = decode_images(files, text, spec)
    return EncodedSample(tokens=text.tokens, labels=text.labels, images=images, positions=text.positions)


def copy_weights(theirs: nn.Module, chunks: Sequence[nn.Module], cfg: ModelConfig) -> None:
    """Through the table that `convert` uses, into a model of any layout."""
    naming = naming_of(cfg)
    state = {naming.understood(key): tensor for key, tensor in hf_tensors(theirs).items()}
    table = {entry.ours: entry for entry in naming.entries(cfg)}
    with torch.no_grad():
        for local in local_parameters(chunks):
            entry = table[local.boxes[0].key]
            whole = entry.transform.join([state[entry.part, name] for name in entry.theirs], entry.sizes)
            for box, view in local.pieces(local.parameter.data):
                assert tuple(whole.shape) == box.global_shape, box.key
                view.copy_(whole[box.slices])


def hf_logits(
    theirs: Any, cfg: ModelConfig, one: EncodedSample, sizes: Sequence[tuple[int, int]], image_id: int
) -> Tensor:
    """[T, V] of transformers' class."""
    if cfg.family == "blip2" and not sizes:  # its forward wants an image always
        return theirs.language_model(input_ids=torch.tensor([list(one.tokens)])).logits[0]
    return theirs(**hf_inputs(cfg, one, sizes, image_id)).logits[0]
