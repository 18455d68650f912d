"""Does the layout fit the model and the number of processes? No torch: a bad layout fails before anything starts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from vlm_nemo.runtime.architecture import check_architecture, head_dim
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError

if TYPE_CHECKING:
    from vlm_nemo.model.config import LanguageConfig, ModelConfig


def check_layout(
    parallel: ParallelConfig,
    model: ModelConfig | None,
    *,
    world_size: int,
    global_packs: int | None = None,
    micro_packs: int = 1,
    capacity: int | None = None,
) -> None:
    """Raise UserError, one line that says what to change, where these cannot work together.

    model: None where it is not known yet (it lies in a checkpoint); call again when it is.
    global_packs, micro_packs, capacity: of the data, for training; None where no packs are read.
    """
    _check_sizes(parallel)
    _check_vision(parallel)
    if model is not None:
        check_architecture(model)
        _check_experts(parallel, model.language, world_size)
        _check_tensor(parallel, model)
        _check_pipeline(parallel, model)
    _check_world(parallel, world_size, global_packs, micro_packs)
    if capacity is not None:
        _check_row(parallel, capacity, micro_packs)
        if model is not None:
            _check_fp8(parallel, model, capacity * micro_packs)


def _check_row(parallel: ParallelConfig, capacity: int, micro_packs: int) -> None:
    """What is cut along a row's length must come out even."""
    cut, pieces = [], 1
    if parallel.context > 1:
        pieces = 2 * parallel.context
        cut.append(f"parallel.context={parallel.context} cuts each row into {pieces} chunks")
    if parallel.sequence:
        ranks = parallel.tensor * parallel.context
        pieces = math.lcm(pieces, ranks)
        cut.append(f"parallel.sequence shards each row over {ranks} ranks")
    if capacity * micro_packs % pieces:
        raise UserError(
            f"{' and '.join(cut)}, which do not divide data.pack.capacity={capacity}; make it a multiple of {pieces}"
        )


def _check_sizes(parallel: ParallelConfig) -> None:
    for name in ("tensor", "pipeline", "virtual", "context", "expert"):
        if (size := getattr(parallel, name)) < 1:
            raise UserError(f"parallel.{name}={size}: the smallest is 1")
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("parallel.sequence=true needs parallel.tensor > 1; raise parallel.tensor or set it to false")
    if parallel.virtual > 1 and parallel.pipeline == 1:
        raise UserError(f"parallel.virtual={parallel.virtual} needs parallel.pipeline > 1; set parallel.virtual=1")
    for name in ("distributed_optimizer", "overlap_grad_reduce"):
        if parallel.overlap_param_gather and not getattr(parallel, name):
            raise UserError(f"parallel.overlap_param_gather=true needs parallel.{name}=true; set that too")


def _check_fp8(parallel: ParallelConfig, model: ModelConfig, tokens: int) -> None:
    """FP8's matrix products take multiples of 16 tokens."""
    ranks = parallel.context * (parallel.tensor if parallel.sequence else 1)
    if model.fp8 != "none" and tokens % (16 * ranks):
        raise UserError(
            f"model.fp8={model.fp8} multiplies blocks of 16 tokens, but a micro-batch has {tokens} on {ranks} ranks; "
            f"make data.pack.capacity a multiple of {16 * ranks}"
        )


def vision_alone(parallel: ParallelConfig) -> bool:
    """Whether each of several tensor ranks holds the vision tower whole, and takes some of a row's images."""
    return parallel.vision is not None and parallel.vision != parallel.tensor


def vision_layout(parallel: ParallelConfig) -> ParallelConfig:
    """The layout as the vision tower and the projector see it: with their own tensor size."""
    return replace(parallel, tensor=parallel.tensor if parallel.vision is None else parallel.vision)


def _check_vision(parallel: ParallelConfig) -> None:
    if parallel.vision not in (None, 1, parallel.tensor):
        raise UserError(
            f"parallel.vision={parallel.vision}: the vision tower is split as the decoder is (null, or "
            f"parallel.tensor={parallel.tensor}) or whole on every rank (1)"
        )


def _check_experts(parallel: ParallelConfig, language: LanguageConfig, world_size: int) -> None:
    """Experts must spread evenly over ranks that there are."""
    moe, ranks = language.moe, parallel.expert
    if moe.experts is None:
        if ranks > 1:
            raise UserError(
                f"parallel.expert={ranks} spreads experts, and this model has none (model.language.moe.experts=null); "
                "set parallel.expert=1"
            )
        return
    if moe.experts % ranks:
        fits = " or ".join(str(n) for n in range(1, moe.experts + 1) if moe.experts % n == 0)
        raise UserError(
            f"parallel.expert={ranks} does not divide model.language.moe.experts={moe.experts}; this model takes "
            f"parallel.expert={fits}"
        )
    stage = world_size // parallel.pipeline
    if stage % ranks:
        raise UserError(
            f"parallel.expert={ranks} takes its ranks from the {stage} of tensor x context x data, which it does not "
            f"divide; start a multiple of {ranks * parallel.pipeline} ranks or lower parallel.expert"
        )


def _check_tensor(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Every dimension that tensor parallelism cuts must be a multiple of it.

    Fewer key/value heads than ranks are shared by several ranks each; then tensor must be a multiple of them.
    """
    language, kv_heads = model.language, model.language.num_kv_heads
    cut = {
        "model.language.num_heads": language.num_heads,
        "model.language.ffn_hidden_size": language.ffn_hidden_size,
        "model.language.vocab_size": language.vocab_size,
    }
    moe = language.moe
    if moe.experts is not None and moe.ffn_hidden_size is not None and parallel.expert == 1:
        cut["model.language.moe.ffn_hidden_size"] = moe.ffn_hidden_size
    if moe.experts is not None and moe.shared_ffn_hidden_size is not None:
        cut["model.language.moe.shared_ffn_hidden_size"] = moe.shared_ffn_hidden_size
    if not vision_alone(parallel):
        cut["model.vision.num_heads"] = model.vision.num_heads
        cut["model.vision.ffn_hidden_size"] = model.vision.ffn_hidden_size
    if language.input_tokens:
        cut["model.language.vocab_size + input_tokens"] = language.vocab_size + language.input_tokens
    # One matrix makes queries, keys and values; its rows are cut evenly even where ranks share a head.
    qkv = (language.num_heads + 2 * kv_heads) * head_dim(language)

    looks = bool(language.cross_attention_layers)  # which have a matrix of keys and values alone, of whole heads

    def shared(n: int) -> bool:
        return kv_heads % n == 0 or (not looks and n % kv_heads == 0 and qkv % n == 0)

    wrong = [f"does not divide {key}={size}" for key, size in cut.items() if size % parallel.tensor]
    if not shared(parallel.tensor):
        wrong.append(
            f"does not divide model.language.num_kv_heads={kv_heads}, which layers that look at images split whole"
            if looks
            else f"neither divides model.language.num_kv_heads={kv_heads} nor is a multiple of it that cuts evenly"
        )
    if wrong:
        most = min(cut.values())
        fits = [str(n) for n in range(1, most + 1) if shared(n) and all(s % n == 0 for s in cut.values())]
        whole = ", or parallel.vision=1" if all("model.vision." in reason for reason in wrong) else ""
        raise UserError(
            f"parallel.tensor={parallel.tensor} {wrong[0]}; this model takes parallel.tensor={' or '.join(fits)}{whole}"
        )


def _check_pipeline(parallel: ParallelConfig, model: ModelConfig) -> None:
    if parallel.virtual > 1 and model.language.cross_attention_layers:
        raise UserError(
            f"parallel.virtual={parallel.virtual} sends hidden states of one length only, but with "
            "model.language.cross_attention_layers an image's features travel with them; set parallel.virtual=1"
        )
    layers, chunks = model.language.num_layers, parallel.pipeline * parallel.virtual
    what = f"parallel.pipeline={parallel.pipeline}"
    if parallel.virtual > 1:
        what += f" x parallel.virtual={parallel.virtual}"
    if chunks > layers:
        raise UserError(
            f"{what} is deeper than model.language.num_layers={layers}; lower it to {layers} chunks or fewer"
        )
    given = parallel.layers
    fits = len(given) == chunks and sum(given) == layers and given[0] >= 0 and min(given[1:], default=1) >= 1
    if given and not fits:
        raise UserError(
            f"parallel.layers={list(given)} must be {chunks} numbers ({what}), at least 1 each but for the first, that "
            f"sum to model.language.num_layers={layers}; or [], which balances them"
        )


def _check_world(parallel: ParallelConfig, world_size: int, global_packs: int | None, micro_packs: int) -> None:
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_ranks:
        context = f" x parallel.context={parallel.context}" if parallel.context > 1 else ""
        raise UserError(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}{context} takes a multiple of "
            f"{model_ranks} ranks, and {world_size} {'was' if world_size == 1 else 'were'} started; "
            "change either number"
        )
    if global_packs is None:
        return
    data_ranks = world_size // model_ranks
    if micro_packs < 1:
        raise UserError(f"data.micro_packs={micro_packs}: the smallest is 1")
    if global_packs % data_ranks:
        fewer = max(n for n in range(1, data_ranks) if global_packs % n == 0)
        raise UserError(
            f"{world_size} ranks make {data_ranks} data-parallel ranks, which do not divide "
            f"data.global_packs={global_packs}; start {fewer * model_ranks} ranks or make data.global_packs "
            f"a multiple of {data_ranks * micro_packs}"
        )
    own = global_packs // data_ranks
    if own % micro_packs:
        raise UserError(
            f"data.global_packs={global_packs} is {own} packs a data-parallel rank, which "
            f"data.micro_packs={micro_packs} does not divide; make data.global_packs a multiple of "
            f"{data_ranks * micro_packs} or lower data.micro_packs"
        )
    if parallel.virtual > 1 and own // micro_packs % parallel.pipeline:
        raise UserError(
            f"the interleaved schedule needs a multiple of parallel.pipeline={parallel.pipeline} micro-batches a "
            f"data-parallel rank and has {own // micro_packs}; make data.global_packs a multiple of "
            f"{parallel.pipeline * data_ranks * micro_packs} or set parallel.virtual=1"
        )
