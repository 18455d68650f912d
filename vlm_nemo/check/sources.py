"""The recipe's own samples, planned and read as training does, or why there are none to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlm_nemo.check.labels import NO_IMAGES, Spoken
from vlm_nemo.data.chat import TEMPLATES, Template, check_names
from vlm_nemo.data.config import DataConfig
from vlm_nemo.data.encode import Encoder
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.mixture import Mixture, build_mixture, drawn
from vlm_nemo.data.planner import Planner
from vlm_nemo.data.sample import EncodedSample, SampleError
from vlm_nemo.data.storage.cache import Cache
from vlm_nemo.data.storage.folders import open_folder
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import UserError


def template_of(cfg: DataConfig) -> Template:
    """Raises UserError for a name that there is not."""
    if cfg.template not in TEMPLATES:
        raise UserError(f"data.template={cfg.template} is unknown; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[cfg.template]


def absent(cfg: DataConfig) -> str | None:
    """Why there is nothing to look at on this machine; None where there is. What is remote counts as there."""
    if not cfg.sources:
        return "data.sources is empty"
    if not Path(cfg.tokenizer or "/").joinpath("tokenizer.json").is_file():
        return f"data.tokenizer={cfg.tokenizer} is not here"
    for name in drawn(cfg.sources):
        path = cfg.sources[name].path
        if "://" not in path and not Path(path.partition("{")[0]).parent.exists():
            return f"data.sources.{name}.path={path} is not here"
        if "://" not in path and "{" not in path and not Path(path).exists():
            return f"data.sources.{name}.path={path} is not here"
    return None


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the loader opens, without its thread."""

    cfg: DataConfig
    encoder: Encoder
    mixture: Mixture

    def planner(self, max_tokens: int) -> Planner:
        """Of the run's rows, from its first sample on."""
        pack = self.cfg.pack
        return Planner(
            self.encoder,
            self.mixture,
            capacity=pack.capacity,
            pool=pack.pool,
            max_tokens=max_tokens,
            vision_capacity=pack.vision_capacity,
        )

    def spoken(self, count: int) -> list[Spoken]:
        """The first samples of the order that can be used, of `count`, in words and in tokens; no image is read."""
        found = []
        for source, _, record in self.mixture.places(0, count):
            try:
                messages = self.encoder.folders[source].record(record).messages
                text = self.encoder.text(source, record)
            except SampleError:
                continue
            sample = EncodedSample(tokens=text.tokens, labels=text.labels, images=NO_IMAGES)
            found.append(Spoken(messages, sample, self.encoder.name(source, record)))
        return found


def open_sources(cfg: DataConfig, spec: ImageSpec, *, seed: int) -> Sources:
    """Raises UserError as the loader does."""
    tokenizer, template = Tokenizer(cfg.tokenizer), template_of(cfg)
    check_names(template, spec.layout, tokenizer)
    cache = Cache(cfg.store)
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
