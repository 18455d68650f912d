"""Greedy decoding of many requests at once, under any tensor x pipeline layout.

Each request gets a slot of a packed row, its prompt and the room for its answer, so nothing moves while it decodes:

    slot 0                          slot 1
    p p p p  a1 .  .  .             p p p p p p  a1 .  .  .

The next token comes from the logits at a slot's last filled place.

Positions and segments are those of training; what is still empty lies in the future of what is asked, so causal
attention never sees it. A request's answer does not depend on its row mates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from vlm_nemo.data.packing import pack_batch
from vlm_nemo.data.sample import EncodedSample
from vlm_nemo.model.batch import ModelBatch, model_batch
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.vision import output_tokens
from vlm_nemo.model.vlm import VLM
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.groups import Ranks
from vlm_nemo.types import IGNORE_INDEX, UserError


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt with its images."""

    tokens: Sequence[int]
    """Prompt ids, every image as its placeholders."""
    images: Callable[[], Tensor]
    """Decodes them, [n, 3, S, S] uint8; called when the request's turn comes, on the ranks that need it"""


@dataclass(kw_only=True)
class Engine:
    """A model ready to answer. Every rank of the job calls it with the same requests and gets the same answers."""

    chunk: VLM
    cfg: ModelConfig
    ranks: Ranks
    image_token: int
    pad_token: int
    eos_token: int
    vocab_size: int
    """The tokenizer's; rows of the head beyond it are padding and are never chosen."""
    row_tokens: int = 4096
    """Tokens of a row: how many requests are decoded together."""

    def generate(
        self, requests: Sequence[Request], max_new_tokens: int, progress: Callable[[int], None] | None = None
    ) -> list[list[int]]:
        """Answers, without eos, in the order of the requests; each ends at eos or after max_new_tokens.

        progress: called with the number of requests finished by this replica. Data ranks share the requests.
        Raises UserError if a prompt and its answer are longer than the model's max_positions.
        """
        longest = max((len(r.tokens) for r in requests), default=0) + max_new_tokens
        if longest > self.cfg.language.max_positions:
            raise UserError(
                f"a prompt of {longest - max_new_tokens} tokens and {max_new_tokens} new ones exceed "
                f"model.language.max_positions={self.cfg.language.max_positions}"
            )
        numbered = list(enumerate(requests))[self.ranks.data_rank :: self.ranks.data]
        answers: dict[int, list[int]] = {}
        self.chunk.eval()
        with torch.no_grad():
            for row in self._rows(numbered, max_new_tokens):
                decoded = self._decode([request for _, request in row], max_new_tokens)
                answers.update(zip((number for number, _ in row), decoded, strict=True))
                if progress is not None:
                    progress(len(row))
        gathered: list[Any] = [None] * self.ranks.data
        dist.all_gather_object(gathered, answers, group=groups.data_group())
        merged = {number: answer for found in gathered for number, answer in found.items()}
        return [merged[i] for i in range(len(requests))]

    def _rows(self, numbered: list[tuple[int, Request]], room: int) -> Iterator[list[tuple[int, Request]]]:
        row: list[tuple[int, Request]] = []
        used = 0
        for number, request in numbered:
            need = len(request.tokens) + room
            if row and used + need > self.row_tokens:
                yield row
                row, used = [], 0
            row.append((number, request))
            used += need
        if row:
            yield row

    def _decode(self, row: list[Request], room: int) -> list[list[int]]:
        """All answers of one row, a token a round."""
        slots = [len(request.tokens) + room for request in row]
        multiple = self.ranks.tensor  # sequence parallelism cuts a row into equal parts
        capacity = -(-max(sum(slots), 1) // multiple) * multiple
        packed = pack_batch(
            [
                EncodedSample(
                    tokens=[*request.tokens, *[self.pad_token] * room],
                    labels=[IGNORE_INDEX] * (len(request.tokens) + room),
                    images=request.images(),
                )
                for request in row
            ],
            capacity,
            self.pad_token,
            self.cfg.vision.image_size,
        )
        batch = model_batch(
            packed,
            image_token=self.image_token,
            tokens_per_image=output_tokens(self.cfg.vision),
            image_size=self.cfg.vision.image_size,
            device=device.device(),
        )
        images = self.chunk.embed_images(batch.images) if self.chunk.pre_process else None
        starts = torch.tensor([sum(slots[:i]) for i in range(len(slots))])
        last = starts + torch.tensor([len(request.tokens) for request in row]) - 1
        answers: list[list[int]] = [[] for _ in row]
        open_slots = list(range(len(row)))
        for _ in range(room):
            where = last[open_slots].to(batch.tokens.device)
            chosen = self._next_tokens(batch, images, where)
            following = []
            for slot, token in zip(open_slots, chosen, strict=True):
                if token != self.eos_token:
                    answers[slot].append(token)
                    following.append((slot, token))
            if not following:
                break
            open_slots = [slot for slot, _ in following]
            last[open_slots] += 1
            tokens = batch.tokens.clone()
            tokens[0, last[open_slots]] = torch.tensor([token for _, token in following], device=tokens.device)
            batch = replace(batch, tokens=tokens)
        return answers

    def _next_tokens(self, batch: ModelBatch, images: Tensor | None, where: Tensor) -> list[int]:
        """The likeliest next token at each place, known to every rank of the replica."""

        def step(rows: Iterator[ModelBatch], model: nn.Module) -> tuple[Tensor, Any]:
            logits = model(next(rows), gather_logits=True, image_embeds=images)
            return logits, lambda output, non_loss_data=False: output

        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([batch]),
            model=self.chunk,
            num_microbatches=1,
            seq_length=batch.tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if self.ranks.last_stage:
            chosen = outputs[0][0, where, : self.vocab_size].argmax(-1)
        else:
            chosen = torch.empty(len(where), dtype=torch.int64, device=device.device())
        if self.ranks.pipeline > 1:
            dist.broadcast(chosen, src=groups.last_stage_rank(), group=groups.pipeline_group())
        return chosen.tolist()
