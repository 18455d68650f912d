"""The vision-language model: vision -> projector -> merge -> language. Read `VLM.forward` first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from vlm_nemo.model.batch import ModelBatch
from vlm_nemo.model.boxes import mark_shared
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.head import Targets
from vlm_nemo.model.kernels import choose
from vlm_nemo.model.language import language_config, language_model
from vlm_nemo.model.projector.build import build_projector
from vlm_nemo.model.share import Place, Share, embedders, gathered
from vlm_nemo.model.views import Features, VisionBatch
from vlm_nemo.model.vision import VisionTower
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.layout import vision_alone, vision_layout
from vlm_nemo.types import UserError

PARTS = ("vision", "projector", "language")
"""The parts that can be frozen, and the first word of every parameter's name."""


class VLM(MegatronModule):
    """One pipeline stage (or virtual chunk) of the model. Vision, projector and embedding live on the first."""

    def __init__(
        self, cfg: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, *, vp_stage: int | None = None
    ) -> None:
        check_looks(cfg)
        kernels = choose(cfg.kernels, cfg.fp8)
        config = language_config(cfg.language, parallel, dtype, cfg.megatron, kernels, cfg.fp8)
        super().__init__(config=config)
        self.looks = bool(cfg.language.cross_attention_layers)
        self._received: Tensor | None = None
        self.image_place: Place = embedders(parallel, kept=False).place
        """Which of how many ranks this one is that share out a row's images, where features are not kept."""
        self.whole_rows = parallel.context == 1
        ignore_virtual = vp_stage is None
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage)
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = cfg.language.tied_embeddings
        if self.pre_process:
            self.vision = VisionTower(cfg.vision, vision_layout(parallel), dtype, kernels)
            self.projector = build_projector(cfg, vision_layout(parallel), dtype)
            if vision_alone(parallel):
                mark_shared(self.vision)
                mark_shared(self.projector)
        self.language = language_model(
            cfg.language, config, first=self.pre_process, last=self.post_process, vp_stage=vp_stage, kernels=kernels
        )

    def forward(self, batch: ModelBatch, *, gather_logits: bool = False, image_rows: Tensor | None = None) -> Tensor:
        """Last stage: the loss of every supervised token [S], or with gather_logits the logits [1, T, V] (of a
        generation step, those after each row: [1, rows, V]). Earlier stages: hidden states [T, 1, D] (split over the
        tensor group under sequence parallelism).

        image_rows: the result of `embed_images` for this batch, where it is known already.
        """
        x = features = None
        if self.pre_process:
            x = self.language.embed(batch.tokens, batch.positions)
            if image_rows is None:
                assert batch.views is not None, "every row of training has a view, were it a blank one"
                image_rows = self.embed_images(batch.views, batch.share, batch.keep)
            if self.looks:
                features = image_rows.unsqueeze(1).to(x.dtype)
            else:
                x = place_images(x, image_rows, batch.image_slots, batch.image_sources, batch.image_shares)
            if self.config.sequence_parallel:
                x = scatter_to_sequence_parallel_region(x)
        elif self.looks:
            features = self.take_features(batch.tokens.shape[1])
        out = self.language(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=None,
            decoder_input=x,
            labels=None if gather_logits else Targets(batch.supervised, batch.labels, batch.loss_mask),
            packed_seq_params=batch.segments,
            runtime_gather_output=gather_logits or None,
            extra_block_kwargs={"context": features} if self.looks else None,
        )
        # What the next stage's layers look at travels behind the hidden states
        return torch.cat((out, features)) if self.looks and not self.post_process else out

    def take_features(self, tokens: int) -> Tensor:
        """[E, 1, D]: cut off what came behind the hidden states of so many tokens."""
        assert self._received is not None
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        hidden, features = self._received.split((tokens // ranks, len(self._received) - tokens // ranks))
        self.language.set_input_tensor(hidden)
        return features

    def embed_images(
        self, views: VisionBatch | Features, share: Share | None = None, keep: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """[E + K, D]: the views' embeddings, then the projector's K extra rows. A frozen tower saves no activations.

        share: the views are this rank's share of a row's; E counts those of all ranks. keep: is given the tower's
        features [N, D].
        """
        if isinstance(views, Features):
            features = views.rows
        else:
            frozen = not any(p.requires_grad for p in self.vision.parameters())
            with torch.no_grad() if frozen else contextlib.nullcontext():
                features = self.vision(views)
            if keep is not None:
                keep(features)
        rows = self.projector(features, views.grids)
        if share is not None:
            rows = gathered(rows, share, alike=self.whole_rows)
        extra = self.projector.extra_rows()
        return rows if extra is None else torch.cat((rows, extra))

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Called by megatron's schedules with the previous stage's hidden states."""
        if self.looks and not self.pre_process:
            self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        else:
            self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Called by megatron to sum the gradients of tied embeddings over the first and last stage."""
        return self.language.shared_embedding_or_output_weight()


def check_looks(cfg: ModelConfig) -> None:
    """Refuse cross-attention that does not fit together. Raises UserError."""
    layers, kind = cfg.language.cross_attention_layers, cfg.projector.kind
    if bool(layers) != (kind == "cross_attention"):
        raise UserError(
            f"model.projector.kind={kind} and model.language.cross_attention_layers={list(layers)} do not go together: "
            "with kind=cross_attention the layers that look at images must be named, with another there are none"
        )
    if not all(0 <= n < cfg.language.num_layers for n in layers):
        raise UserError(
            f"model.language.cross_attention_layers={list(layers)} are not all among the decoder's "
            f"{cfg.language.num_layers} layers, counted from 0"
        )


def place_images(embeds: Tensor, rows: Tensor, slots: Tensor, sources: Tensor, shares: Tensor | None = None) -> Tensor:
    """Put what the images gave where their placeholders are.

    embeds: [T, 1, D]; rows: [E + K, D], see `VLM.embed_images`; slots: [M] rows of embeds; sources: [M], which of
    `rows` stands there; with shares [M, 4] sources are [M, 4], and the mean of four rows does. Without placeholders
    the images are a blank stand-in: it takes part with weight zero, so that its layers still receive (zero) gradients
    and every rank runs the same collectives. Counts are checked in `model_batch`.
    """
    if slots.numel() == 0:
        return embeds + rows.sum().to(embeds.dtype) * 0.0
    placed = rows[sources] if shares is None else (rows[sources] * shares.unsqueeze(-1).to(rows.dtype)).sum(1)
    return embeds.index_copy(0, slots, placed.unsqueeze(1).to(embeds.dtype))
