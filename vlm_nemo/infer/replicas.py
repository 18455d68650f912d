"""Several ranks, one engine each: data-parallel replicas share the prompts, a server's ranks share its commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vlm_nemo.infer.engine import Prompt, RequestOutput
from vlm_nemo.infer.load import LoadedModel
from vlm_nemo.infer.sampling import SamplingParams
from vlm_nemo.types import UserError

Commands = TypeVar("Commands")


def generate(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    progress: Callable[[int], None] | None = None,
) -> list[RequestOutput]:
    """Engine.generate over all replicas: each answers its share, every rank gets all answers, in order.

    progress: called with the number of prompts that this replica has finished.
    """
    ranks = model.ranks
    if ranks is None or ranks.data == 1:
        return model.engine.generate(prompts, params, progress)
    import torch.distributed as dist

    from vlm_nemo.runtime import groups

    mine = prompts[ranks.data_rank :: ranks.data]
    gathered: list[Any] = [None] * ranks.data
    dist.all_gather_object(gathered, model.engine.generate(mine, params, progress), group=groups.data_group())
    outputs: list[Any] = [None] * len(prompts)
    for rank, found in enumerate(gathered):
        outputs[rank :: ranks.data] = found
    return outputs


def sharer(model: LoadedModel) -> Callable[[Any], Any]:
    """A function that hands every rank what the first one gives it: a server's ranks then do the same in step.

    Raises UserError for a layout with data-parallel replicas: nothing would send them different requests.
    """
    ranks = model.ranks
    if ranks is None or ranks.world == 1:
        return lambda commands: commands
    if ranks.data > 1:
        raise UserError(
            f"{ranks.world} processes for parallel.tensor={ranks.tensor} x parallel.pipeline={ranks.pipeline}: a "
            f"server is one replica; start {ranks.tensor * ranks.pipeline}"
        )
    import torch.distributed as dist

    def share(commands: Any) -> Any:
        box = [commands]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    return share
