"""The same ids and pixels through transformers' class and through our model: how far the logits are apart.

Resizing has tests of its own and differs by up to two levels of 255, so transformers' model sees our pixels here, in
the shape that it takes them. transformers is imported in this file alone.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlm_nemo.data.chat import TEMPLATES, encode_prompt
from vlm_nemo.data.image import decode_images, plan_images
from vlm_nemo.data.packing import pack_batch
from vlm_nemo.data.sample import EncodedSample, Message
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.tiles import tilings
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError

QUESTION = "What is in this picture?"
FILE = "parity.json"


def report(
    hf: Path,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    template: str,
    load: Callable[[Sequence[nn.Module]], None],
    image: bytes | None,
) -> dict[str, Any]:
    """Both models in fp32, asked about one image: max |dlogit|, argmax agreement. Both are in memory, one by one.

    hf: the folder that transformers loads. cfg, load: our model of the same weights. image: a file's bytes; None = a
    picture that is drawn. Raises UserError where transformers is not installed.
    """
    messages: list[Message] = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
    spec, image = spec_of(cfg), drawn(cfg) if image is None else image
    plans = plan_images([image], spec)
    text = encode_prompt(messages, tokenizer, TEMPLATES[template], plans)
    images = decode_images([image], text, spec)
    sample = EncodedSample(tokens=text.tokens, labels=text.labels, images=images, positions=text.positions)
    ours = _ours(cfg, tokenizer, load, sample)
    theirs = _theirs(hf, hf_inputs(cfg, sample, [size_of(image)], tokenizer.image_id))
    return {**compared(ours, theirs), "tokens": len(text.tokens), "precision": "fp32", "question": QUESTION}


def compared(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Two [T, V] of logits."""
    return {
        "max_dlogit": float((ours - theirs).abs().max()),
        "max_logit": float(theirs.abs().max()),
        "argmax_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }


def write(found: dict[str, Any], out: Path) -> str:
    """Write out/parity.json; the line to print."""
    (out / FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return (
        f"parity with transformers (fp32, {found['tokens']} tokens): max |dlogit| {found['max_dlogit']:.2g} of logits "
        f"up to {found['max_logit']:.3g}, same argmax at {found['argmax_agreement']:.1%} of the places; {out / FILE}"
    )


def drawn(cfg: ModelConfig) -> bytes:
    """A picture of odd sides, about as large as two views."""
    side = cfg.vision.image_size
    width, height = 2 * side - 3, side + 5
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = [255 * x, 255 * y, 127 + 100 * np.sin(9 * x + 5 * y)]
    held = io.BytesIO()
    Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(held, "PNG")
    return held.getvalue()


def size_of(image: bytes) -> tuple[int, int]:
    """Width and height."""
    with Image.open(io.BytesIO(image)) as opened:
        return opened.size


def _ours(
    cfg: ModelConfig, tokenizer: Tokenizer, load: Callable[[Sequence[nn.Module]], None], sample: EncodedSample
) -> Tensor:
    with device.adapter(), torch.no_grad():
        groups.start(ParallelConfig(), seed=0)
        try:
            chunks = build_model(cfg, ParallelConfig(), "fp32", 0, fresh=())
            load(chunks)
            row = pack_batch([sample], len(sample.tokens), tokenizer.pad_id, cfg.vision.patch_size)
            batch = model_batch(row, cfg, image_token=tokenizer.image_id, device=device.device())
            return chunks[0].eval()(batch, gather_logits=True)[0].float().cpu()
        finally:
            groups.stop()


def _theirs(folder: Path, inputs: dict[str, Any]) -> Tensor:
    try:
        from transformers import AutoModelForImageTextToText
    except ImportError:
        raise UserError("parity=true needs transformers: pip install 'transformers>=5,<6'") from None
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(**inputs).logits[0].float()


def hf_inputs(
    cfg: ModelConfig, sample: EncodedSample, sizes: Sequence[tuple[int, int]], image_id: int
) -> dict[str, Any]:
    """What transformers' class takes for a conversation: our ids, and our pixels in its shapes.

    sizes: (width, height) of the images, which LLaVA-NeXT asks for.
    """
    held = sample.images
    ids = torch.tensor([list(sample.tokens)])
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if cfg.family == "gemma3":
        given["token_type_ids"] = (ids == image_id).long()
    if cfg.family in ("qwen2_vl", "qwen2_5_vl"):
        given["mm_token_type_ids"] = (ids == image_id).long()
    if not sizes:
        return given
    views = _views(cfg, held)
    if cfg.family in ("qwen2_vl", "qwen2_5_vl"):
        given["pixel_values"] = torch.cat([_blocks(cfg, view) for view in views])
        given["image_grid_thw"] = torch.tensor([[1, rows, columns] for rows, columns in held.grids.tolist()])
        return given
    if cfg.family in ("llava_next", "llava_onevision"):
        counts = held.views.tolist()
        tiles = torch.zeros(len(counts), max(counts), *views[0].shape)
        for n, part in enumerate(torch.stack(views).split(counts)):
            tiles[n, : len(part)] = part
        given["pixel_values"] = tiles
        given["image_sizes"] = torch.tensor([[height, width] for width, height in sizes])
        if cfg.family == "llava_onevision":
            given["batch_num_images"] = torch.tensor([len(counts)])
        return given
    if cfg.family == "mllama":
        return given | _tiled(cfg, held, views, sample.tokens, image_id)
    given["pixel_values"] = torch.stack(views)
    if cfg.family in ("idefics3", "smolvlm"):
        given["pixel_values"] = given["pixel_values"][None]
        given["pixel_attention_mask"] = torch.ones(1, len(views), *views[0].shape[1:], dtype=torch.bool)
    return given


def _tiled(cfg: ModelConfig, images: Any, views: list[Tensor], tokens: Sequence[int], image_id: int) -> dict[str, Any]:
    """Llama 3.2 Vision's: all images of one conversation, filled up with tiles of zeros, and who looks where."""
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    most, counts = cfg.vision.tiles or 1, images.views.tolist()
    pixels = torch.zeros(1, len(counts), most, *views[0].shape)
    for n, part in enumerate(torch.stack(views).split(counts)):
        pixels[0, n, : len(part)] = part
    numbers = [1 + tilings(most).index((rows, columns)) for rows, columns in images.tilings.tolist()]
    seen = get_cross_attention_token_mask(list(tokens), image_id)
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.tensor([numbers]),
        "aspect_ratio_mask": (torch.arange(most) < torch.tensor(counts)[:, None]).long()[None],
        "cross_attention_mask": torch.from_numpy(
            convert_sparse_cross_attention_mask_to_dense([seen], [counts], most, len(tokens))
        ),
    }


def _views(cfg: ModelConfig, images: Any) -> list[Tensor]:
    """[3, H, W] of every view, colours normalised."""
    p = cfg.vision.patch_size
    mean, std = (torch.tensor(c).view(3, 1, 1) * 255 for c in (cfg.vision.mean, cfg.vision.std))
    found, at = [], 0
    for rows, columns in images.grids.tolist():
        block = torch.from_numpy(images.patches[at : at + rows * columns]).view(rows, columns, p, p, 3)
        at += rows * columns
        view = block.permute(4, 0, 2, 1, 3).reshape(3, rows * p, columns * p)
        found.append((view.float() - mean) / std)
    return found


def _blocks(cfg: ModelConfig, view: Tensor) -> Tensor:
    """[3, H, W] -> [P, 3 t p p]: Qwen's patches, block by block of those that are merged, the frame repeated."""
    p, m, t = cfg.vision.patch_size, cfg.reduce.factor, cfg.vision.temporal_patch_size
    rows, columns = view.shape[1] // p, view.shape[2] // p
    blocks = view.view(3, rows // m, m, p, columns // m, m, p).permute(1, 4, 2, 5, 0, 3, 6)
    return blocks.reshape(rows * columns, 3, 1, p, p).expand(-1, -1, t, -1, -1).reshape(rows * columns, -1)
