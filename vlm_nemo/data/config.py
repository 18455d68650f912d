"""What the model reads. No torch here, so that a recipe composes (and a typo fails) in half a second."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass(kw_only=True)
class SourceConfig:
    """One folder of shards, as `vlm-nemo prepare` writes it, or of tars as img2dataset or energon left them."""

    path: str = MISSING
    """The folder, or its tars as DIR/{00000..00041}.tar: a local path, or a URL of http, https, s3 or gs."""
    weight: float = 1.0
    """Share of the samples drawn, relative to the other sources; 0 leaves the source out."""


@dataclass(kw_only=True)
class PackConfig:
    """How samples are put side by side in a row (`vlm_nemo.data.packing`)."""

    capacity: int = 4096
    """Length of every packed row, tokens."""
    pool: int = 64
    """Samples to choose from when a row is filled; the oldest always goes in."""


@dataclass(kw_only=True)
class StoreConfig:
    """How bytes come from HTTP and object stores (`vlm_nemo.data.store`, `vlm_nemo.data.cache`)."""

    cache_dir: str = "~/.cache/vlm_nemo"
    """Folder on a local disk: what was fetched, and the indexes of tars that came without one."""
    cache_gb: float = 50.0
    """Size limit of what was fetched, GB; the least used goes first. 0 = keep nothing."""
    tries: int = 8
    """How often a request is made before the run stops."""
    timeout: float = 30.0
    """Seconds that one request (a megabyte at most) may take."""
    wait: float = 0.5
    """Seconds before the second try, doubled for each further one."""


@dataclass(kw_only=True)
class DataConfig:
    """What is read, and how it is packed (`vlm_nemo.data.loader`)."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Folders to draw from, each under a name of your choice."""
    tokenizer: str = ""
    """Folder with tokenizer.json (Hugging Face's fast format) and tokenizer_config.json."""
    template: str = "vicuna"
    """How a conversation becomes text: a name in `vlm_nemo.data.chat.TEMPLATES`."""
    pack: PackConfig = field(default_factory=PackConfig)
    global_packs: int = 8
    """Packed rows in one optimizer step, over all data-parallel ranks."""
    shuffle: bool = True
    """Draw in a random order that depends on the seed alone."""
    threads: int = 2
    """Decoding threads a rank."""
    prefetch: int = 2
    """Optimizer steps of data prepared ahead."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of the samples seen had to be dropped."""
    min_samples_before_stop: int = 100
    """Samples to see before max_bad_fraction is judged."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Remote sources: tries, time limits, cache."""


@dataclass(kw_only=True)
class PrepareConfig:
    """From raw files to shards (`vlm_nemo.data.prepare`)."""

    manifest: str = MISSING
    """The dataset's manifest.yaml: where the raw files lie and what kind they are."""
    root: str | None = None
    """Folder of the raw files; null = the manifest's own `root`, or its folder."""
    out: str = MISSING
    """Folder to write: one sub-folder of shards a source."""
    shard_samples: int = 1000
    """Samples a shard."""
    workers: int = 2
    """Processes that convert shards."""
    tokenizer_vocab: int = 0
    """Train a BPE tokenizer of this many tokens on the texts and write it to out/tokenizer; 0 = do not."""
    max_bad_fraction: float = 0.01
    """Fail when more than this share of the raw samples cannot be used."""
    min_samples_before_stop: int = 100
    """Raw samples to see before max_bad_fraction is judged."""
