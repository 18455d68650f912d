"""What a run reads from: folders, tokenizer, template and order, opened once and the same on every rank."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from vlm_nemo.data.chat import TEMPLATES, Template, check_names
from vlm_nemo.data.config import DataConfig
from vlm_nemo.data.encode import Encoder
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.mixture import Mixture, build_mixture, drawn
from vlm_nemo.data.planner import Planner
from vlm_nemo.data.storage.cache import Cache
from vlm_nemo.data.storage.folders import open_folder
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import UserError


def template_of(cfg: DataConfig) -> Template:
    """Raises UserError for a name that there is not."""
    if cfg.template not in TEMPLATES:
        raise UserError(f"data.template={cfg.template} is unknown; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[cfg.template]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Records as samples, and the order in which they come."""

    cfg: DataConfig
    encoder: Encoder
    mixture: Mixture

    def planner(self, max_tokens: int, *, names: bool = True, patience: Mapping[str, int] | None = None) -> Planner:
        """Of the run's rows, from its first sample on; names, patience: as of `Planner`."""
        pack = self.cfg.pack
        return Planner(
            self.encoder,
            self.mixture,
            capacity=pack.capacity,
            pool=pack.pool,
            max_tokens=max_tokens,
            vision_capacity=pack.vision_capacity,
            names=names,
            patience=patience,
        )


def open_sources(
    cfg: DataConfig, spec: ImageSpec, tokenizer: Tokenizer, *, seed: int, stop: threading.Event | None = None
) -> Sources:
    """stop: once set, no store is asked again.

    Raises UserError for an unknown template, a tokenizer without the names it needs, a folder without shards.
    """
    template = template_of(cfg)
    check_names(template, spec.layout, tokenizer)
    cache = Cache(cfg.store, stop)
    folders = {
        name: open_folder(cfg.sources[name].path, f"data.sources.{name}.path", cache=cache)
        for name in drawn(cfg.sources)
    }
    encoder = Encoder(
        folders=folders, tokenizer=tokenizer, template=template, spec=spec, augment=cfg.augment, seed=seed
    )
    records = {name: len(folder) for name, folder in folders.items()}
    mixture = build_mixture(cfg.sources, records, seed=seed, shuffle=cfg.shuffle)
    return Sources(cfg=cfg, encoder=encoder, mixture=mixture)
