"""Floating-point operations that a step needs, for an honest MFU.

Counted: matrix products over real tokens and patches, of experts those that a token goes to. Not counted: padding,
blank stand-ins, tiles that only fill an image up, recomputation, attention across samples, what an image's tokens see
of those behind them, gradients of frozen weights, the head where no label is. A matrix product of P parameters over T
tokens is 2 P T forward; backward adds 2 P T for the input's gradient where something upstream learns, and 2 P T for the
weights' where they learn. Causal attention of a sample of s tokens is 2 s^2 d a layer forward (half of the full
square), twice that backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vlm_nemo.data.layout.spec import view_tokens
from vlm_nemo.model.config import LanguageConfig, ModelConfig, VisionConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.vision import layers_used

Grid = tuple[int, int]
"""Rows and columns of patches of a view."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """By part; the attention of a part is in it."""

    vision: float
    projector: float
    language: float
    head: float

    @property
    def total(self) -> float:
        return self.vision + self.projector + self.language + self.head


def step_flops(
    cfg: ModelConfig,
    trained: Mapping[str, bool],
    *,
    lengths: Sequence[int],
    grids: Sequence[Grid],
    supervised: int,
    views: Sequence[int] | None = None,
    looked: Sequence[tuple[int, int]] = (),
    known: Sequence[Grid] = (),
) -> Flops:
    """FLOPs of forward and backward.

    trained: part -> whether it learns; lengths: tokens of every sample, image tokens included; grids: of every view
    that the tower looked at; supervised: labels that take part in the loss; views: of every image that the tower looked
    at, None = one; looked: so many tokens look at so many features, where the decoder has layers for it; known: grids
    of the views whose features were known before.
    """
    lang = cfg.language
    linear, attention, embed = _tower(cfg.vision, grids, [1] * len(grids) if views is None else views)
    vision = (linear + attention) * (3 if trained["vision"] else 1) + embed * (2 if trained["vision"] else 1)

    projector = 0.0
    for i, (parameters, rows) in enumerate(_projections(cfg, [*grids, *known])):
        upstream = trained["vision"] or (i > 0 and trained["projector"])
        projector += 2 * parameters * rows * (1 + upstream + trained["projector"])

    features = sum(view_tokens(spec_of(cfg), grid) for grid in [*grids, *known]) if lang.cross_attention_layers else 0
    language = sum(layer_flops(lang, layer, trained, lengths, looked, features) for layer in range(lang.num_layers))
    passes = 1 + any(trained.values()) + trained["language"]
    head = 2 * lang.hidden_size * lang.vocab_size * supervised * passes
    return Flops(vision=float(vision), projector=float(projector), language=language, head=float(head))


def layer_flops(
    lang: LanguageConfig,
    layer: int,
    trained: Mapping[str, bool],
    lengths: Sequence[int],
    looked: Sequence[tuple[int, int]] = (),
    features: int = 0,
) -> float:
    """FLOPs of forward and backward of one layer of the decoder, counted from 0; see `step_flops`.

    features: of all images, where the layer is one that looks at them.
    """
    backward_through = any(trained.values())
    if layer in lang.cross_attention_layers:
        work = _looking(lang, layer, looked, features)
        seen: float = sum(tokens * those for tokens, those in looked)
    else:
        work = decoder_layer(lang, layer) * sum(lengths)
        seen = sum(_seen(lang, layer, n) for n in lengths)
    linear = 2 * work * (1 + backward_through + trained["language"])
    return linear + 4 * _head_dim(lang) * lang.num_heads * seen * (3 if backward_through else 1)


def view_flops(cfg: ModelConfig, grid: Grid, tiles: int = 1) -> float:
    """FLOPs of forward of one view, or an image's tiles, through tower and projector: their matrices grow with the
    patches, the tower's attention with their square."""
    grids = [grid] * tiles
    projector = sum(2 * parameters * rows for parameters, rows in _projections(cfg, grids))
    return float(sum(_tower(cfg.vision, grids, [tiles])) + projector)


def decoder_layer(lang: LanguageConfig, layer: int) -> int:
    """Parameters in the matrices of one layer that a token meets: of experts, those that it goes to."""
    attention = lang.hidden_size * _head_dim(lang) * (2 * lang.num_heads + 2 * lang.num_kv_heads)
    moe = lang.moe
    if moe.experts is None or not moe.sparse(layer):
        return attention + 3 * lang.hidden_size * lang.ffn_hidden_size
    inside = moe.top_k * (moe.ffn_hidden_size or lang.ffn_hidden_size) + (moe.shared_ffn_hidden_size or 0)
    gate = moe.experts + (moe.shared_ffn_hidden_size is not None and moe.shared_gate)
    return attention + lang.hidden_size * (3 * inside + gate)


def _looking(lang: LanguageConfig, layer: int, looked: Sequence[tuple[int, int]], features: int) -> int:
    """Parameters times rows in the matrices of a layer that looks at images: the text's, then the features'."""
    keys = 2 * lang.hidden_size * _head_dim(lang) * lang.num_kv_heads
    return (decoder_layer(lang, layer) - keys) * sum(tokens for tokens, _ in looked) + keys * features


def _head_dim(lang: LanguageConfig) -> int:
    return lang.head_dim or lang.hidden_size // lang.num_heads


def _seen(lang: LanguageConfig, layer: int, n: int) -> float:
    """Pairs of query and key that the causal attention of a sample of n tokens needs: half a square, or a band."""
    local = lang.window is not None and (lang.global_every is None or (layer + 1) % lang.global_every != 0)
    if lang.window is None or not local or n <= lang.window:
        return n * n / 2
    return lang.window * n - lang.window**2 / 2


def _tower(v: VisionConfig, grids: Sequence[Grid], views: Sequence[int]) -> tuple[int, int, int]:
    """Forward: the layers' matrices, their attention, and the patches' own product."""
    patches = sum(rows * columns for rows, columns in grids)
    tokens = patches + len(grids) * v.class_token
    layer = 4 * v.hidden_size**2 + (3 if v.gated else 2) * v.hidden_size * v.ffn_hidden_size
    layers = layers_used(v) + v.global_layers
    if v.tiles is None:
        pairs = sum(
            _pairs(v, grid, None if v.window is None or i in v.full_attention_layers else v.window // v.patch_size)
            for i in range(layers)
            for grid in grids
        )
    else:  # the tiles of an image see one another
        one = grids[0][0] * grids[0][1] + v.class_token if grids else 0
        pairs = layers * sum((count * one) ** 2 for count in views)
    embed = 2 * 3 * v.patch_size**2 * v.hidden_size * patches  # of equal frames the weights are summed first
    return 2 * layers * layer * tokens, 4 * v.hidden_size * pairs, embed


def _pairs(v: VisionConfig, grid: Grid, window: int | None) -> int:
    """Pairs of query and key in a view, or in its windows of so many patches a side."""
    if window is None:
        return (grid[0] * grid[1] + v.class_token) ** 2
    high, wide = ([min(window, side - at) for at in range(0, side, window)] for side in grid)
    return sum((h * w) ** 2 for h in high for w in wide)


def _projections(cfg: ModelConfig, grids: Sequence[Grid]) -> Iterator[tuple[int, int]]:
    """(parameters, rows) of the projector's matrices; what its queries and keys give one another is left out."""
    p, spec, wide = cfg.projector, spec_of(cfg), cfg.language.hidden_size
    embeddings = sum(view_tokens(spec, grid) for grid in grids)
    features = sum(rows * columns for rows, columns in grids) + len(grids) * spec.class_token
    given = cfg.vision.feature_size * (1 if cfg.reduce.kind == "average_pool" else spec.factor**2)
    if p.kind in ("mlp", "cross_attention"):
        hidden, layers = p.hidden_size or wide, p.num_layers if p.kind == "mlp" else 1
        widths = [given, *[hidden] * (layers - 1), wide]
        yield from ((a * b, embeddings) for a, b in zip(widths, widths[1:], strict=False))
    elif p.kind == "visual_vocabulary":
        yield given * (p.vocabulary - p.indicators), embeddings
        yield p.vocabulary * wide, embeddings
    else:
        hidden, gated = p.hidden_size or wide, p.kind == "perceiver"
        inside = p.ffn_hidden_size or 4 * hidden
        heads = (p.num_kv_heads or p.num_heads) / p.num_heads
        for i in range(p.num_layers):
            looks = gated or i % p.cross_attention_every == 0
            if looks:
                yield round(2 * heads * given * hidden), features
            own = 2 * hidden**2 + (0 if gated else 2 * hidden**2) + (2 * hidden**2 if looks and not gated else 0)
            yield own + (3 if gated else 2) * hidden * inside, embeddings
        yield hidden * wide, embeddings
