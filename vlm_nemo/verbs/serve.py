"""`vlm-nemo serve`: a model behind HTTP. Under several ranks the first one serves and the others follow."""

from __future__ import annotations

import os
import signal

from vlm_nemo.config import ServeRoot
from vlm_nemo.infer import replicas
from vlm_nemo.infer.load import LoadedModel, open_model
from vlm_nemo.serve import run
from vlm_nemo.serve.turns import follow
from vlm_nemo.verbs.common import set_up_logging


def serve(cfg: ServeRoot) -> None:
    """Listen until SIGTERM or SIGINT. Raises UserError for a model, an address or a key that is not good."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    set_up_logging(rank)

    def load() -> LoadedModel:
        return open_model(
            checkpoint=cfg.checkpoint.load,
            hf=cfg.hf,
            export=cfg.export,
            infer=cfg.infer,
            parallel=cfg.parallel,
            precision=cfg.precision,
            reserve=True,
        )

    if rank == 0:
        run.serve(load, cfg.serve, sharer=replicas.sharer, several=world > 1)
        return
    # The launcher's signals are for rank 0, which tells the others when to stop
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    model = load()
    follow(model.engine, replicas.sharer(model))
    model.close()
