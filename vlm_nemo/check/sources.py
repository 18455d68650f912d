"""Is there data to look at, and what do its first samples say?"""

from __future__ import annotations

from pathlib import Path

from vlm_nemo.check.labels import NO_IMAGES, Spoken
from vlm_nemo.data.config import DataConfig
from vlm_nemo.data.mixture import drawn
from vlm_nemo.data.sample import EncodedSample, SampleError
from vlm_nemo.data.sources import Sources


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


def spoken_samples(sources: Sources, count: int) -> list[Spoken]:
    """The first samples of the order that can be used, of `count`, in words and in tokens; no image is read."""
    found, encoder = [], sources.encoder
    for source, _, record in sources.mixture.places(0, count):
        try:
            messages = encoder.folders[source].record(record).messages
            text = encoder.text(source, record)
        except SampleError:
            continue
        sample = EncodedSample(tokens=text.tokens, labels=text.labels, images=NO_IMAGES)
        found.append(Spoken(messages, sample, encoder.name(source, record)))
    return found
