"""Does the layout fit the model and the number of processes? No torch: a bad layout fails before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError

if TYPE_CHECKING:
    from vlm_nemo.model.config import ModelConfig


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
    if model is not None:
        _check_heads(model)
        _check_tensor(parallel, model)
        _check_pipeline(parallel, model)
    _check_world(parallel, world_size, global_packs, micro_packs)
    if parallel.sequence and capacity is not None and capacity * micro_packs % parallel.tensor:
        raise UserError(
            f"parallel.sequence shards each row over {parallel.tensor} ranks, which do not divide "
            f"data.pack.capacity={capacity}; make it a multiple of {parallel.tensor}"
        )


def _check_sizes(parallel: ParallelConfig) -> None:
    for name in ("tensor", "pipeline", "virtual", "context"):
        if (size := getattr(parallel, name)) < 1:
            raise UserError(f"parallel.{name}={size}: the smallest is 1")
    if parallel.context > 1:
        raise UserError(
            f"parallel.context={parallel.context} is not supported by this version; set it to 1 and use "
            "parallel.tensor or more data-parallel ranks"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("parallel.sequence=true needs parallel.tensor > 1; raise parallel.tensor or set it to false")
    if parallel.virtual > 1 and parallel.pipeline == 1:
        raise UserError(f"parallel.virtual={parallel.virtual} needs parallel.pipeline > 1; set parallel.virtual=1")


def _check_heads(model: ModelConfig) -> None:
    """Widths must split into heads, and query heads into groups that share a key and a value."""
    for whole, key, size in (
        (model.language.hidden_size, "model.language.num_heads", model.language.num_heads),
        (model.language.num_heads, "model.language.num_kv_heads", model.language.num_kv_heads),
        (model.vision.hidden_size, "model.vision.num_heads", model.vision.num_heads),
    ):
        if size < 1 or whole % size:
            of = "num_heads" if key.endswith("kv_heads") else "hidden_size"
            raise UserError(f"{key}={size} does not divide {key.rsplit('.', 1)[0]}.{of}={whole}; change either number")


def _check_tensor(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Every dimension that tensor parallelism cuts must be a multiple of it."""
    cut = {
        "model.language.num_heads": model.language.num_heads,
        "model.language.num_kv_heads": model.language.num_kv_heads,
        "model.language.ffn_hidden_size": model.language.ffn_hidden_size,
        "model.language.vocab_size": model.language.vocab_size,
        "model.vision.num_heads": model.vision.num_heads,
        "model.vision.ffn_hidden_size": model.vision.ffn_hidden_size,
    }
    for key, size in cut.items():
        if size % parallel.tensor:
            fits = [str(n) for n in range(1, size + 1) if all(s % n == 0 for s in cut.values())]
            raise UserError(
                f"parallel.tensor={parallel.tensor} does not divide {key}={size}; "
                f"this model takes parallel.tensor={' or '.join(fits)}"
            )


def _check_pipeline(parallel: ParallelConfig, model: ModelConfig) -> None:
    layers, chunks = model.language.num_layers, parallel.pipeline * parallel.virtual
    what = f"parallel.pipeline={parallel.pipeline}"
    if parallel.virtual > 1:
        what += f" x parallel.virtual={parallel.virtual}"
    if chunks > layers:
        raise UserError(
            f"{what} is deeper than model.language.num_layers={layers}; lower it to {layers} chunks or fewer"
        )
    if layers % chunks:
        fits = [str(n) for n in range(1, layers + 1) if layers % n == 0]
        raise UserError(
            f"{what} does not divide model.language.num_layers={layers}; cut it into {' or '.join(fits)} chunks"
        )


def _check_world(parallel: ParallelConfig, world_size: int, global_packs: int | None, micro_packs: int) -> None:
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_ranks:
        raise UserError(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} takes a multiple of "
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
