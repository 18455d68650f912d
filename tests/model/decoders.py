"""Tiny decoders of every kind: transformers' class with random weights, and the same one as ours under any layout.

The images of the two kinds that have some are taken as transformers' tower gives them: only decoders are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from vlm_nemo.model.boxes import local_parameters
from vlm_nemo.model.build import mark_split
from vlm_nemo.model.cache import CachedStep, KVCache, cached_step
from vlm_nemo.model.config import LanguageConfig, RopeScaling
from vlm_nemo.model.head import Targets, targets_of
from vlm_nemo.model.language import language_config, language_model
from vlm_nemo.model.segments import Segments, make_segments
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train import optim, step
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.types import IGNORE_INDEX
from vlm_nemo.weights.names.languages import DECODER, HEAD_NAME
from vlm_nemo.weights.transforms import Sizes

V, D, LAYERS = 64, 32, 4
IMAGE = 60
"""The placeholder."""
SIZES = dict(vocab_size=V, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48)
OURS = dict(vocab_size=V, hidden_size=D, num_layers=LAYERS, num_heads=4, ffn_hidden_size=48)


@dataclass(kw_only=True)
class Sample:
    """What goes into a decoder, and the logits that transformers gives for it."""

    tokens: Tensor
    positions: Tensor
    """[3, n]"""
    embeds: Tensor = field(default_factory=lambda: torch.empty(0, D))
    """Of the placeholders, in order."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """The same, as transformers takes it."""
    logits: Tensor = field(default_factory=lambda: torch.empty(0, V))
    """[n, V]"""

    @property
    def blocks(self) -> Tensor:
        """[n]: runs of placeholders, numbered; -1 elsewhere."""
        there = self.tokens == IMAGE
        first = there & ~torch.cat((torch.tensor([False]), there[:-1]))
        return torch.where(there, first.cumsum(0) - 1, -1)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One family of decoders."""

    ours: dict[str, Any]
    make: Callable[[], nn.Module]
    """transformers' model; `_randomised` follows."""
    samples: Callable[[nn.Module], list[Sample]]
    prefix: str = "model."

    @property
    def cfg(self) -> LanguageConfig:
        return LanguageConfig(**OURS | self.ours)

    def twin(self) -> nn.Module:
        """transformers' model, the same weights on every call and process; none is at its neutral start."""
        torch.manual_seed(0)
        model = self.make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    def with_logits(self, hf: nn.Module) -> list[Sample]:
        samples = self.samples(hf)
        with torch.no_grad():
            for sample in samples:
                sample.logits = hf(**sample.inputs).logits[0]
        return samples


def text(hf: nn.Module) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for n in (150, 9, 23):
        tokens = torch.randint(4, 56, (n,), generator=generator)
        positions = torch.arange(n).expand(3, -1)
        found.append(Sample(tokens=tokens, positions=positions, inputs=dict(input_ids=tokens[None])))
    return found


@torch.no_grad()
def gemma_images(hf: nn.Module) -> list[Sample]:
    """Images of 16 tokens: two, none and one."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for text_lengths in ([7, 5, 90], [12], [1, 11]):
        tokens = [torch.randint(4, 56, (n,), generator=generator) for n in text_lengths]
        for i in range(len(tokens) - 1):
            tokens[i] = torch.cat((tokens[i], torch.full((16,), IMAGE)))
        ids = torch.cat(tokens)
        inputs = dict(input_ids=ids[None], token_type_ids=(ids == IMAGE).long()[None])
        embeds = torch.empty(0, D)
        if len(tokens) > 1:
            inputs["pixel_values"] = torch.randn(len(tokens) - 1, 3, 16, 16, generator=generator)
            embeds = hf.model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
        positions = torch.arange(len(ids)).expand(3, -1)
        found.append(Sample(tokens=ids, positions=positions, embeds=embeds, inputs=inputs))
    return found


@torch.no_grad()
def qwen_images(hf: nn.Module) -> list[Sample]:
    """Images of 6, 4 and 2 tokens, whose positions go by row and column."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for text_lengths, grids in (([5, 4, 70], [(4, 6), (4, 4)]), ([13], []), ([2, 9], [(2, 4)])):
        tokens = [torch.randint(4, 56, (n,), generator=generator) for n in text_lengths]
        for i, (rows, columns) in enumerate(grids):
            tokens[i] = torch.cat((tokens[i], torch.full((rows * columns // 4,), IMAGE)))
        ids = torch.cat(tokens)
        inputs = dict(input_ids=ids[None], mm_token_type_ids=(ids == IMAGE).int()[None])
        embeds, positions = torch.empty(0, D), torch.arange(len(ids)).expand(3, -1)
        if grids:
            grid = torch.tensor([(1, rows, columns) for rows, columns in grids])
            pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4, generator=generator)
            inputs |= dict(pixel_values=pixels, image_grid_thw=grid)
            embeds = torch.cat(hf.model.get_image_features(pixels, grid).pooler_output)
            found_positions, _ = hf.model.get_rope_index(
                ids[None], image_grid_thw=grid, mm_token_type_ids=inputs["mm_token_type_ids"]
            )
            positions = found_positions[:, 0]
        found.append(Sample(tokens=ids, positions=positions, embeds=embeds, inputs=inputs))
    return found


def _gemma_text(**given: Any) -> transformers.Gemma3TextConfig:
    return transformers.Gemma3TextConfig(
        **SIZES,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=10,
        sliding_window_pattern=3,
        query_pre_attn_scalar=24,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        **given,
    )


def _gemma3_vision() -> nn.Module:
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = transformers.Gemma3Config(
        text_config=_gemma_text(), vision_config=vision, mm_tokens_per_image=16, image_token_index=IMAGE
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    config = transformers.Qwen2VLConfig(
        text_config=dict(
            **SIZES,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            pad_token_id=0,
            eos_token_id=None,
        ),
        vision_config=dict(depth=1, embed_dim=16, hidden_size=D, num_heads=2, patch_size=4, mlp_ratio=2),
        image_token_id=IMAGE,
        vision_start_token_id=1,
        vision_end_token_id=2,
        video_token_id=61,
        tie_word_embeddings=False,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


_GEMMA: dict[str, Any] = dict(
    num_kv_heads=1,
    head_dim=16,
    activation="gelu_tanh",
    qk_norm=True,
    norm_eps=1e-6,
    norm_plus_one=True,
    sandwich_norm=True,
    window=10,
    global_every=3,
    attention_scale=24**-0.5,
    rope_base=1e6,
    rope_local_base=1e4,
    rope_scaling=RopeScaling(kind="linear", factor=8.0),
    embedding_scale=D**0.5,
    tied_embeddings=True,
)

KINDS = {
    "llama3": Kind(
        ours=dict(
            num_kv_heads=2,
            rope_base=1e4,
            rope_scaling=RopeScaling(
                kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=100
            ),
        ),
        make=lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **SIZES,
                num_key_value_heads=2,
                rms_norm_eps=1e-5,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 100,
                },
            )
        ),
        samples=text,
    ),
    "smollm2": Kind(
        ours=dict(num_kv_heads=4, rope_base=1e5, tied_embeddings=True),
        make=lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **SIZES,
                num_key_value_heads=4,
                rms_norm_eps=1e-5,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            )
        ),
        samples=text,
    ),
    "mistral": Kind(
        ours=dict(num_kv_heads=2, head_dim=12, window=20),
        make=lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(
                **SIZES, num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-5, sliding_window=20
            )
        ),
        samples=text,
    ),
    "qwen2": Kind(
        ours=dict(num_kv_heads=1, qkv_bias=True, norm_eps=1e-6, tied_embeddings=True),
        make=lambda: transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**SIZES, num_key_value_heads=1, rms_norm_eps=1e-6, tie_word_embeddings=True)
        ),
        samples=text,
    ),
    "qwen3": Kind(
        ours=dict(num_kv_heads=2, head_dim=16, qk_norm=True, norm_eps=1e-6),
        make=lambda: transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6)
        ),
        samples=text,
    ),
    "gemma3": Kind(ours=_GEMMA, make=lambda: transformers.Gemma3ForCausalLM(_gemma_text()), samples=text),
    "gemma3_images": Kind(
        ours=_GEMMA | dict(image_attention="bidirectional"),
        make=_gemma3_vision,
        samples=gemma_images,
        prefix="model.language_model.",
    ),
    "qwen2_vl": Kind(
        ours=dict(num_kv_heads=2, qkv_bias=True, mrope_section=[1, 1, 2], norm_eps=1e-5),
        make=_qwen2_vl,
        samples=qwen_images,
        prefix="model.language_model.",
    ),
}


@dataclass(kw_only=True)
class TextBatch:
    """A row of decoder input."""

    tokens: Tensor
    targets: Targets | None
    positions: Tensor
    segments: Segments | CachedStep
    embeds: Tensor
    slots: Tensor

    @property
    def loss_mask(self) -> Tensor:
        assert self.targets is not None
        return self.targets.weights


class TextModel(MegatronModule):
    """The decoder as VLM holds it, with ready embeddings in place of images."""

    def __init__(self, cfg: LanguageConfig, parallel: ParallelConfig, vp_stage: int | None) -> None:
        config = language_config(cfg, parallel, torch.float32, {})
        super().__init__(config=config)
        ignore = vp_stage is None
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=ignore, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=ignore, vp_stage=vp_stage)
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = cfg.tied_embeddings
        self.language = language_model(cfg, config, first=self.pre_process, last=self.post_process, vp_stage=vp_stage)

    def forward(self, batch: TextBatch, *, gather_logits: bool = False) -> Tensor:
        x = None
        if self.pre_process:
            x = self.language.embed(batch.tokens, batch.positions)
            x = x.index_copy(0, batch.slots, batch.embeds[:, None])
            if self.config.sequence_parallel:
                x = scatter_to_sequence_parallel_region(x)
        return self.language(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=None,
            decoder_input=x,
            labels=None if gather_logits else batch.targets,
            packed_seq_params=batch.segments,
            runtime_gather_output=gather_logits or None,
        )

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        return self.language.shared_embedding_or_output_weight()


def build(kind: Kind, hf: nn.Module, parallel: ParallelConfig) -> list[TextModel]:
    """This rank's chunks with transformers' weights. Every weight of ours must be found."""
    stages = range(parallel.virtual) if parallel.virtual > 1 else [None]
    chunks = [TextModel(kind.cfg, parallel, stage) for stage in stages]
    parameters = local_parameters(chunks)
    mark_split(parameters)
    values = table(kind, hf)
    with torch.no_grad():
        for local in parameters:
            for box, view in local.pieces(local.parameter.data):
                assert values[box.key].shape == box.global_shape, box.key
                view.copy_(values[box.key][box.slices])
    return chunks


def table(kind: Kind, hf: nn.Module) -> dict[str, Tensor]:
    """Our tensors, whole, from transformers' weights, by the names that `convert` goes by."""
    cfg, theirs = kind.cfg, hf.state_dict()
    sizes = Sizes(heads=cfg.num_heads, kv_heads=cfg.num_kv_heads)

    def tensor(name: str) -> Tensor:
        return theirs[name if name == HEAD_NAME else kind.prefix + name.removeprefix("model.")]

    return {
        entry.ours: entry.transform.join([tensor(name) for name in entry.theirs], entry.sizes)
        for entry in DECODER.entries("language", cfg, cfg.num_layers, sizes)
    }


def row(kind: Kind, samples: Sequence[Sample], capacity: int) -> TextBatch:
    """Samples side by side, then padding; the second half of each is supervised."""
    tail = capacity - sum(len(s.tokens) for s in samples)
    assert tail >= 0
    lengths = [len(s.tokens) for s in samples] + ([tail] if tail else [])
    tokens = torch.cat([*(s.tokens for s in samples), torch.zeros(tail, dtype=torch.int64)])
    positions = torch.cat([*(s.positions for s in samples), torch.arange(tail).expand(3, -1)], dim=1)
    blocks = None
    if kind.cfg.image_attention == "bidirectional":
        blocks = torch.cat([*(s.blocks for s in samples), torch.full((tail,), -1)])
    mask = torch.cat([*((torch.arange(len(s.tokens)) * 2 > len(s.tokens)) for s in samples), torch.zeros(tail) > 0])
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return TextBatch(
        tokens=tokens[None],
        targets=targets_of(torch.where(mask, tokens.roll(-1), IGNORE_INDEX)),
        positions=positions[:, None],
        segments=make_segments(cu, capacity - tail, blocks=blocks),
        embeds=torch.cat([s.embeds for s in samples]),
        slots=(tokens == IMAGE).nonzero().flatten(),
    )


def run(chunks: list[TextModel], batch: TextBatch, parallel: ParallelConfig) -> Tensor | None:
    """Logits [T, V] on the last stage, None elsewhere."""

    def forward(batches: Iterator[TextBatch], model: nn.Module) -> tuple[Tensor, Any]:
        return model(next(batches), gather_logits=True), lambda output, non_loss_data=False: output

    count = parallel.pipeline if parallel.virtual > 1 else 1
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter([batch] * count) for _ in chunks] if len(chunks) > 1 else iter([batch]),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=count,
            seq_length=batch.tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs[0][0] if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None


def train(kind: Kind, hf: nn.Module, parallel: ParallelConfig, steps: int = 2) -> list[tuple[float, float]]:
    """(sum of the losses, gradient norm) of each step over two rows. The losses are on the last stage only."""
    chunks = build(kind, hf, parallel)
    cfg = OptimConfig(language_lr=1e-2, weight_decay=0.1, clip_grad=1.0, warmup_steps=0)
    model = optim.wrap(chunks, parallel)  # type: ignore[arg-type]
    optimizer = optim.build_optimizer(cfg, parallel, "fp32", model)
    step.prepare_model(model)
    one, two, three = kind.samples(hf)
    history = []
    for number in range(1, steps + 1):
        rows = [row(kind, [one, two], 192), row(kind, [three, one], 192)]
        optim.set_rates(optimizer, cfg, number, steps)
        result = step.train_step(model, optimizer, rows, cfg.clip_grad)  # type: ignore[arg-type]
        assert result.applied
        history.append((result.loss_sum, result.grad_norm))
    return history


def greedy(
    chunk: TextModel, kind: Kind, prompts: Sequence[Sample], new: int, chunk_tokens: int
) -> list[tuple[list[int], Tensor]]:
    """Each prompt goes on by `new` tokens through the cache, all side by side; the first prompt enters in pieces of
    `chunk_tokens`, which cut no image. Of each, the tokens and the logits [new, V] that chose them."""
    cache = KVCache(len(prompts), 256)
    said: list[list[int]] = [[] for _ in prompts]
    reasons: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    while any(len(each) < new for each in said):
        rows, parts = [], []
        for slot, prompt in enumerate(prompts):
            n = len(prompt.tokens)
            ends = n if slot else min(n, done[slot] + chunk_tokens)
            if done[slot] < n:
                where = slice(done[slot], ends)
                keep = (prompt.tokens[:ends] == IMAGE).cumsum(0)
                embeds = prompt.embeds[keep[where.start - 1] if where.start else 0 : keep[-1]]
                parts.append((prompt.tokens[where], prompt.positions[:, where], prompt.blocks[where], embeds))
                rows.append((slot, done[slot], ends - done[slot]))
            elif len(said[slot]) < new:
                at = prompt.positions[:, -1:].max() + len(said[slot])
                parts.append((torch.tensor(said[slot][-1:]), at.expand(3, 1), torch.tensor([-1]), torch.empty(0, D)))
                rows.append((slot, done[slot], 1))
        order = sorted(range(len(rows)), key=lambda i: rows[i][1] > 0)
        rows, parts = [rows[i] for i in order], [parts[i] for i in order]
        tokens, positions, blocks, embeds = (
            torch.cat([p[i] for p in parts], dim=d) for i, d in enumerate((0, 1, 0, 0))
        )
        places = cached_step(
            cache, rows, torch.device("cpu"), blocks if kind.cfg.image_attention == "bidirectional" else None
        )
        batch = TextBatch(
            tokens=tokens[None],
            targets=None,
            positions=positions[:, None],
            segments=places,
            embeds=embeds,
            slots=(tokens == IMAGE).nonzero().flatten(),
        )
        with torch.no_grad():
            logits = chunk(batch, gather_logits=True)[0]
        for (slot, _, n), after in zip(rows, logits, strict=True):
            done[slot] += n
            if done[slot] >= len(prompts[slot].tokens):
                said[slot].append(int(after.argmax()))
                reasons[slot].append(after)
    return [(ids, torch.stack(logits)) for ids, logits in zip(said, reasons, strict=True)]
