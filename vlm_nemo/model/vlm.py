"""The vision-language model: vision -> projector -> merge -> language. Read `VLM.forward` first."""

from __future__ import annotations

import contextlib

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from vlm_nemo.model.batch import ModelBatch
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.language import language_config, language_model
from vlm_nemo.model.projector.build import build_projector
from vlm_nemo.model.views import VisionBatch
from vlm_nemo.model.vision import VisionTower
from vlm_nemo.runtime.config import ParallelConfig

PARTS = ("vision", "projector", "language")
"""The parts that can be frozen, and the first word of every parameter's name."""


class VLM(MegatronModule):
    """One pipeline stage (or virtual chunk) of the model. Vision, projector and embedding live on the first."""

    def __init__(
        self, cfg: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, *, vp_stage: int | None = None
    ) -> None:
        config = language_config(cfg.language, parallel, dtype, cfg.megatron)
        super().__init__(config=config)
        ignore_virtual = vp_stage is None
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage)
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = cfg.language.tied_embeddings
        if self.pre_process:
            self.vision = VisionTower(cfg.vision, parallel, dtype)
            self.projector = build_projector(cfg, parallel, dtype)
        self.language = language_model(
            cfg.language, config, first=self.pre_process, last=self.post_process, vp_stage=vp_stage
        )

    def forward(self, batch: ModelBatch, *, gather_logits: bool = False, image_rows: Tensor | None = None) -> Tensor:
        """Last stage: the loss of every token [1, T], or with gather_logits the logits [1, T, V] (of a generation
        step, those after each row: [1, rows, V]). Earlier stages: hidden states [T, 1, D] (split over the tensor
        group under sequence parallelism).

        image_rows: the result of `embed_images` for this batch, where it is known already.
        """
        x = None
        if self.pre_process:
            x = self.language.embed(batch.tokens, batch.positions)
            if image_rows is None:
                assert batch.views is not None, "every row of training has a view, were it a blank one"
                image_rows = self.embed_images(batch.views)
            x = place_images(x, image_rows, batch.image_slots, batch.image_sources)
            if self.config.sequence_parallel:
                x = scatter_to_sequence_parallel_region(x)
        return self.language(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=None,
            decoder_input=x,
            labels=None if gather_logits else batch.labels,
            packed_seq_params=batch.segments,
            runtime_gather_output=gather_logits or None,
        )

    def embed_images(self, views: VisionBatch) -> Tensor:
        """[E + K, D]: the views' embeddings, then the projector's K extra rows. A frozen tower saves no activations."""
        frozen = not any(p.requires_grad for p in self.vision.parameters())
        with torch.no_grad() if frozen else contextlib.nullcontext():
            features = self.vision(views)
        rows = self.projector(features, views.grids)
        extra = self.projector.extra_rows()
        return rows if extra is None else torch.cat((rows, extra))

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Called by megatron's schedules with the previous stage's hidden states."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Called by megatron to sum the gradients of tied embeddings over the first and last stage."""
        return self.language.shared_embedding_or_output_weight()


def place_images(embeds: Tensor, rows: Tensor, slots: Tensor, sources: Tensor) -> Tensor:
    """Put what the images gave where their placeholders are.

    embeds: [T, 1, D]; rows: [E + K, D], see `VLM.embed_images`; slots: [M] rows of embeds; sources: [M], which of
    `rows` stands there. Without placeholders the images are a blank stand-in: it takes part with weight zero, so that
    its layers still receive (zero) gradients and every rank runs the same collectives. Counts are checked in
    `model_batch`.
    """
    if slots.numel() == 0:
        return embeds + rows.sum().to(embeds.dtype) * 0.0
    return embeds.index_copy(0, slots, rows[sources].unsqueeze(1).to(embeds.dtype))
