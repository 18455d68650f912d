"""What the model reads. No torch here, so that a recipe composes (and a typo fails) in half a second."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

TEMPLATES = (
    "vicuna",
    "plain",
    "short",
    "mistral",
    "llama3",
    "llama32",
    "chatml",
    "qwen",
    "onevision",
    "gemma",
    "idefics3",
    "blip2",
)
"""Names of `vlm_nemo.data.chat.TEMPLATES`, known before anything is imported."""


@dataclass(kw_only=True)
class SourceConfig:
    """One folder of shards, as `vlm-nemo prepare` writes it, or of tars as img2dataset or energon left them."""

    path: str = MISSING
    """The folder, or its tars as DIR/{00000..00041}.tar: a local path, or a URL of http, https, s3 or gs."""
    weight: float | None = None
    """Share of the samples drawn, relative to the other sources; null = 1, 0 leaves the source out."""
    epochs: float | None = None
    """Instead of a weight: how often one cycle of the blend goes through the source, as 1 or 0.25. All sources then
    have epochs or samples, and each cycle is one random order of all its samples."""
    samples: int | None = None
    """Instead of a weight: samples of the source in one cycle of the blend."""
    max_bad_fraction: float | None = None
    """Stop when more than this share of the source's samples had to be dropped; null = data.max_bad_fraction."""


@dataclass(kw_only=True)
class PackConfig:
    """How samples are put side by side in a row (`vlm_nemo.data.packing`)."""

    capacity: int = 4096
    """Length of every packed row, tokens."""
    pool: int = 64
    """Samples to choose from when a row is filled; the oldest always goes in."""
    vision_capacity: int | None = None
    """Most patches that the vision tower computes for a row; null = no limit."""


@dataclass(kw_only=True)
class AugmentConfig:
    """Random changes to pixels and prompts, new in every epoch (`vlm_nemo.data.augment`); all off by default."""

    crop_scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """Share of an image's area that a random crop keeps, from … to …; it is stretched back to the image's size."""
    crop_ratio: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """Width over height of the crop relative to the image's own, from … to …; [0.75, 1.33] is usual."""
    brightness: float = 0.0
    """Brightness times 1 - x to 1 + x."""
    contrast: float = 0.0
    """Contrast times 1 - x to 1 + x."""
    saturation: float = 0.0
    """Saturation times 1 - x to 1 + x."""
    hue: float = 0.0
    """Hue turned by up to x of the colour circle, 0 to 0.5; keep it small where answers name colours."""
    text_dropout: float = 0.0
    """Probability that a user's turn with images loses its text; for captions, as a question would be lost too."""


@dataclass(kw_only=True)
class StoreConfig:
    """How bytes come from HTTP and object stores (`vlm_nemo.data.storage.store`, `vlm_nemo.data.storage.cache`)."""

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
    template: str = field(default="vicuna", metadata={"choices": TEMPLATES})
    """How a conversation becomes text (`vlm_nemo.data.chat.TEMPLATES`). Captions: plain."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    global_packs: int = 8
    """Packed rows in one optimizer step, over all data-parallel ranks."""
    micro_packs: int = 1
    """Packed rows in one forward pass."""
    shuffle: bool = True
    """Draw in a random order that depends on the seed alone; false = each source in its files' order."""
    threads: int = 2
    """Decoding threads a replica of the model; 0 = decode where rows are planned."""
    prefetch: int = 2
    """Optimizer steps of data prepared ahead."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of a source's samples seen had to be dropped, 0 to 1, or clearly more of the last
    ones alone (`vlm_nemo.data.ledger`)."""
    min_samples_before_stop: int = 100
    """Samples of a source to see before max_bad_fraction is judged; ten times as many, 1000 at least, are the last
    ones."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Remote sources: tries, time limits, cache."""
    vision_cache: str | None = None
    """Folder for what a frozen vision tower makes of the images: computed once, to the bit the same when read back,
    also by later runs; null = computed every time. Ranks that could share out a row's images (parallel.vision=1) embed
    all of them each. `vlm-nemo check` says how large it gets."""
    vision_cache_gb: float = 500.0
    """Size limit of that folder, GB; what does not fit is computed every time."""


@dataclass(kw_only=True)
class LayoutConfig:
    """How an image becomes views (squares, or itself) and text around its embeddings (`vlm_nemo.data.layout`)."""

    kind: str = field(
        default="square", metadata={"choices": ("square", "anyres", "tiles", "canvas", "ovis", "rows", "native")}
    )
    """square: one view; anyres: LLaVA-NeXT's tiles of the best resolution, unpadded, and the whole; tiles: InternVL's
    tiles and thumbnail; canvas: Llama 3.2's fitted tiles; ovis: Ovis' grid; rows: Idefics3's rows of tiles; native: one
    view of the image's own shape (Qwen2-VL)."""
    aspect: str = field(default="pad", metadata={"choices": ("pad", "crop", "squash")})
    """How an image becomes square: pad (LLaVA-1.5's training), crop (CLIP's centre crop), squash."""
    resample: str = field(default="bicubic", metadata={"choices": ("bicubic", "bilinear", "lanczos")})
    """Filter of resizing."""
    pinpoints: list[list[int]] = field(default_factory=list)
    """Of anyres: resolutions to choose from, [height, width] in pixels."""
    max_unpadded: int | None = None
    """Of anyres: embeddings of the tiles, in whole tiles, beyond which they are scaled down (LLaVA-OneVision's
    anyres_max_9); null = never."""
    tiles_if_alone: bool = False
    """Of anyres: an image among several of its conversation is one padded view, without tiles (LLaVA-OneVision)."""
    min_tiles: int = 1
    """Of tiles: fewest."""
    max_tiles: int = 12
    """Of tiles, canvas and ovis: most, the thumbnail not counted."""
    thumbnail: bool = True
    """Of tiles: the whole image as one more view where there are several."""
    longest_edge: int | None = None
    """Of rows: side that the longer edge is resized to before it is cut, pixels."""
    min_pixels: int = 3136
    """Of native: fewest, by scaling up."""
    max_pixels: int = 1003520
    """Of native: most, by scaling down."""
    before: str = ""
    """Text before an image's embeddings, special tokens by name ("<img>"; Gemma 3: "\\n\\n<start_of_image>")."""
    after: str = ""
    """Text behind them."""


@dataclass(kw_only=True)
class PrepareConfig:
    """From raw files to shards (`vlm_nemo.data.prepare.run`)."""

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
    tokenizer: str | None = None
    """Measure all texts for the tokenizer in this folder, so that training plans without reading them; null = for the
    one that tokenizer_vocab trained, if any."""
    template: str = field(default="vicuna", metadata={"choices": TEMPLATES})
    """The template to measure for, `data.template` of the training."""
    capacity: int = 4096
    """Length of a packed row to give advice on, tokens: `data.pack.capacity` of the training."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """`model.layout` of the training: its before and after are part of the texts; the rest is for advice and audit."""
    image_size: int = 336
    """Side of the model's input, pixels: for tokens a sample, in advice and audit."""
    patch_size: int = 14
    """Side of the model's patches, pixels."""
    reduce: str = field(
        default="none", metadata={"choices": ("none", "pixel_shuffle", "merge", "hidden_stride", "average_pool")}
    )
    """How neighbouring patches become one token: `model.reduce.kind`."""
    factor: int = 2
    """So many of them along each side, unless reduce=none: `model.reduce.factor`."""
    queries: int | None = None
    """Tokens a view whatever its size (Q-Former, Perceiver): `model.projector.num_queries`; null = from the sizes."""
    audit: bool = False
    """Print what is in the data, and write it to out/audit with plots. Reads every byte of every shard and fails where
    one is damaged; without it, a shard is reused if its length and its index are what they were."""
    audit_samples: int = 5000
    """Texts a source that the audit reads."""
    max_bad_fraction: float = 0.01
    """Fail when more than this share of a source's raw samples cannot be used; filtered ones and duplicates do not
    count. A source may have its own in the manifest."""
    min_samples_before_stop: int = 100
    """Raw samples to see before max_bad_fraction is judged."""
