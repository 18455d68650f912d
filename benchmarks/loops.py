"""The two training loops that peers_cpu compares; each yields what every optimizer step went through.

Both train the projector and the language model with AdamW, fp32, gradients clipped, the tower frozen: LLaVA's stage 2.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from benchmarks.llava_twin import PLACEHOLDERS, processor
from benchmarks.made import SOURCE, opened

BATCH = 16
"""Samples of a padded batch: LLaVA-1.5's per_device_train_batch_size."""
CAPACITY, ROWS = 3584, 4
"""Tokens of a packed row, and rows of a step: about as many samples as a padded batch."""
LR, BETAS, CLIP = 2e-5, (0.9, 0.999), 1.0


class Done(NamedTuple):
    """What a step went through."""

    samples: int
    tokens: int
    """Without padding."""
    places: int
    """With it."""
    loss: float
    """Per supervised token."""


def ours(out: Path, *, rows: int = ROWS, only: Sequence[int] | None = None) -> Generator[Done]:
    """Packed rows through the repository's own loader, model, schedule and optimizer.

    only: records of which one step is made, in this order, instead of the shuffled data.
    """
    from vlm_nemo.data.tokenizer import Tokenizer
    from vlm_nemo.model.batch import model_batch
    from vlm_nemo.model.build import build_model
    from vlm_nemo.model.layout import spec_of
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.runtime.config import ParallelConfig
    from vlm_nemo.train import checkpoint, optim
    from vlm_nemo.train.config import OptimConfig
    from vlm_nemo.train.origin import checkpoint_config, model_config
    from vlm_nemo.train.step import prepare_model, train_step

    logging.disable()
    step_folder = out / "checkpoint"
    model_cfg, parallel = model_config(checkpoint_config(step_folder)), ParallelConfig()
    optim_cfg = OptimConfig(lr=LR, projector_lr=LR, language_lr=LR, beta1=BETAS[0], beta2=BETAS[1], clip_grad=CLIP)
    tokenizer = Tokenizer(step_folder / "tokenizer")
    with device.adapter():
        groups.start(parallel, 0)
        chunks = build_model(model_cfg, parallel, "fp32", 0)
        checkpoint.load_weights(step_folder, chunks)
        optim.freeze(chunks, optim.part_rates(optim_cfg))
        model = optim.wrap(chunks, parallel)
        optimizer = optim.build_optimizer(optim_cfg, parallel, "fp32", model)
        prepare_model(model)
        optim.set_rates(optimizer, optim_cfg, 1, 10**9)
        spec = spec_of(model_cfg)
        sizes = dict(capacity=CAPACITY, rows=rows, max_tokens=model_cfg.language.max_positions)
        data = opened(out, tokenizer, spec, **sizes, shuffle=only is None, threads=1, prefetch=1)
        with closing(data) as loader, contextlib.ExitStack() as stack:
            stack.callback(groups.stop)
            while True:
                packed = loader.next().batches if only is None else _rows(loader, only, tokenizer.pad_id, spec.patch)
                batches = [
                    model_batch(row, model_cfg, image_token=tokenizer.image_id, device=device.device())
                    for row in packed
                ]
                result = train_step(model, optimizer, batches, CLIP)
                yield Done(
                    sum(row.samples for row in packed),
                    sum(row.used_tokens for row in packed),
                    sum(len(row.tokens) for row in packed),
                    result.loss_sum / result.loss_tokens,
                )


def _rows(loader: Any, records: Sequence[int], pad_id: int, patch: int) -> list[Any]:
    """Given records in rows, as many as fit each."""
    from vlm_nemo.data.encode import PlannedSample
    from vlm_nemo.data.packing import pack_batch

    rows: list[list[Any]] = [[]]
    for number in records:
        encoder = loader._encoder
        text = encoder.text(SOURCE, number)
        sample = encoder.sample(PlannedSample(number, SOURCE, 0, number, len(text.tokens), 0, text))
        if sum(len(other.tokens) for other in rows[-1]) + len(sample.tokens) > CAPACITY:
            rows.append([])
        rows[-1].append(sample)
    return [pack_batch(row, CAPACITY, pad_id, patch) for row in rows]


class Conversations(torch.utils.data.Dataset):
    """LLaVA's JSON and its folder of images, as its users read them."""

    def __init__(self, folder: Path, template: Any) -> None:
        self.folder, self.template = folder, template
        self.rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        picture = None
        if "image" in row:
            with Image.open(self.folder / "images" / row["image"]) as opened:
                picture = opened.convert("RGB")
        question, answer = (turn["value"] for turn in row["conversations"])
        prompt = f"<s>{self.template.system} USER: {question} ASSISTANT:"
        return {"prompt": prompt, "text": f"{prompt} {answer}</s>", "picture": picture}

    def length(self, number: int) -> int:
        """What group_by_length sorts by, as LLaVA counts it: words, and an image's tokens."""
        row = self.rows[number]
        said = sum(len(turn["value"].split()) for turn in row["conversations"])
        return said + (PLACEHOLDERS if "image" in row else 0)


class Collator:
    """Samples to a batch padded to its longest; what is not answer is masked out of the labels."""

    def __init__(self, made: Any) -> None:
        self.processor = made
        self.marker = made.tokenizer(" ASSISTANT:", add_special_tokens=False)["input_ids"]

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        pictures = [sample["picture"] for sample in samples if sample["picture"] is not None]
        texts = [sample["text"] for sample in samples]
        settings = dict(padding=True, return_tensors="pt", add_special_tokens=False)
        batch = dict(self.processor(images=pictures or None, text=texts, **settings))
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = -100
        for row in labels:
            row[: _after(row.tolist(), self.marker)] = -100
        return {**batch, "labels": labels}


def _after(row: list[int], marker: list[int]) -> int:
    """Where the answer begins."""
    for start in range(len(row) - len(marker) + 1):
        if row[start : start + len(marker)] == marker:
            return start + len(marker)
    raise ValueError("no answer in a sample")


def theirs(
    out: Path, *, grouped: bool, attention: str, batch: int = BATCH, only: Sequence[int] | None = None
) -> Generator[Done]:
    """transformers' model in a loop as its Trainer runs it: random batches, or batches of like lengths (grouped)."""
    from transformers import LlavaForConditionalGeneration
    from transformers.trainer_pt_utils import LengthGroupedSampler
    from transformers.utils import logging as their_logging

    from vlm_nemo.data.chat import TEMPLATES

    their_logging.disable_progress_bar()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(out / "hf", attn_implementation=attention).train()
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
    data, collate = Conversations(out.parent, TEMPLATES["vicuna"]), Collator(processor(out / "tokenizer"))
    sampler: Any = only
    if only is None and grouped:
        sampler = LengthGroupedSampler(batch, lengths=[data.length(i) for i in range(len(data))])
    while True:
        loader: Any = torch.utils.data.DataLoader(
            data, batch_size=batch, sampler=sampler, shuffle=sampler is None, collate_fn=collate, drop_last=only is None
        )
        for inputs in loader:
            result = model(**inputs, use_cache=False)
            result.loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            mask = inputs["attention_mask"]
            yield Done(len(mask), int(mask.sum()), mask.numel(), float(result.loss.detach()))
