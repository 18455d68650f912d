"""Floating-point operations that a step needs, for an honest MFU.

Counted: matrix products over real tokens. Not counted: padding, recomputation, attention across samples, gradients of
frozen weights, the head where no label is. A matrix product of P parameters over T tokens is 2 P T forward; backward
adds 2 P T for the input's gradient where something upstream learns, and 2 P T for the weights' where they learn.
Causal attention of a sample of s tokens is 2 s^2 d a layer forward (half of the full square), twice that backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.vision import layers_used, output_tokens


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
    cfg: ModelConfig, trained: Mapping[str, bool], *, lengths: Sequence[int], images: int, supervised: int
) -> Flops:
    """FLOPs of forward and backward.

    trained: part -> whether it learns; lengths: tokens of every sample, image tokens included; images: how many;
    supervised: labels that take part in the loss.
    """
    v, lang = cfg.vision, cfg.language
    patches = (v.image_size // v.patch_size) ** 2
    v_tokens = (patches + int(v.class_token)) * images
    v_layers = layers_used(v)
    v_layer = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.ffn_hidden_size
    v_linear = 2 * v_layers * v_layer * v_tokens
    v_attention = 4 * v_layers * v.hidden_size * (patches + int(v.class_token)) * v_tokens
    embed = 2 * 3 * v.patch_size**2 * v.hidden_size * patches * images
    vision = (v_linear + v_attention) * (3 if trained["vision"] else 1) + embed * (2 if trained["vision"] else 1)

    rows = output_tokens(v) * images
    widths = [v.hidden_size] + [lang.hidden_size] * cfg.projector.num_layers
    projector = 0.0
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        upstream = trained["vision"] or (i > 0 and trained["projector"])
        projector += 2 * a * b * rows * (1 + upstream + trained["projector"])

    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    head_dim = lang.hidden_size // lang.num_heads
    layer = lang.hidden_size * head_dim * (2 * lang.num_heads + 2 * lang.num_kv_heads)
    layer += 3 * lang.hidden_size * lang.ffn_hidden_size
    backward_through = any(trained.values())
    passes = 1 + backward_through + trained["language"]
    language = 2 * lang.num_layers * layer * tokens * passes
    language += 2 * lang.num_layers * lang.hidden_size * squares * (3 if backward_through else 1)
    head = 2 * lang.hidden_size * lang.vocab_size * supervised * passes
    return Flops(vision=float(vision), projector=float(projector), language=float(language), head=float(head))
