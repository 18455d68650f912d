"""Tiny towers as transformers' classes with random weights, and how their weights come over to ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.internvl.modeling_internvl import InternVLVisionModel
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
from transformers.models.ovis2.modeling_ovis2 import Ovis2VisionModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_window_index

from tests.model import parts, pieces
from tests.model.parts import PATCH, SQUARE
from vlm_nemo.model.config import VisionConfig
from vlm_nemo.model.views import Grid
from vlm_nemo.model.vision import VisionTower, layers_used
from vlm_nemo.weights.names.towers import TOWERS as NAMES
from vlm_nemo.weights.transforms import Sizes


@dataclass(frozen=True)
class Twin:
    """A tower twice."""

    table: str
    """Of names, in `weights.names.towers`"""
    build: Callable[[], nn.Module]
    """transformers' class"""
    run: Callable[[Any, Tensor], Tensor]
    """Its features [N, D] of one view [3, H, W], colours already normalised."""
    any_grid: bool = True
    """Whether transformers' class takes other grids than its own."""


def hidden_state(index: int) -> Callable[[Any, Tensor], Tensor]:
    """Of CLIP-like classes: hidden state `index` (interpolated positions), the class token dropped."""

    def run(model: Any, view: Tensor) -> Tensor:
        out = model(view[None], output_hidden_states=True, interpolate_pos_encoding=True)
        return out.hidden_states[index][0]

    return run


def last(model: Any, view: Tensor) -> Tensor:
    return model(view[None], interpolate_pos_encoding=True).last_hidden_state[0]


def own_grid(model: Any, view: Tensor) -> Tensor:
    return model(view[None]).last_hidden_state[0]


def qwen(model: Any, view: Tensor) -> Tensor:
    """Qwen's patches come in blocks of 2 x 2, and so do its features; here they are put back row by row."""
    rows, columns = view.shape[1] // PATCH, view.shape[2] // PATCH
    blocks = view.reshape(3, rows // 2, 2, PATCH, columns // 2, 2, PATCH).permute(1, 4, 2, 5, 0, 3, 6)
    frames = blocks.reshape(rows * columns, 3, 1, PATCH, PATCH).expand(-1, -1, 2, -1, -1)
    kept: list[Tensor] = []
    hook = model.merger.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model(frames.flatten(1), torch.tensor([[1, rows, columns]]))
    hook.remove()
    features = kept[0]
    if "2_5" in type(model).__name__:  # its merger sees the order of the windows
        index, _ = get_vision_window_index(
            torch.tensor([[1, rows, columns]]), spatial_merge_size=2, window_size=4 * PATCH, patch_size=PATCH
        )
        features = features.view(-1, 4, features.shape[1])[torch.argsort(index)].flatten(0, 1)
    return features.view(rows // 2, columns // 2, 2, 2, -1).transpose(1, 2).reshape(rows * columns, -1)


SIZES = dict(
    image_size=SQUARE,
    patch_size=PATCH,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
)


def clip() -> nn.Module:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, hidden_act="quick_gelu"))


def siglip() -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, vision_use_head=False))


def internvit(**given: Any) -> nn.Module:
    sizes = {**SIZES, "image_size": [SQUARE] * 2, "patch_size": [PATCH] * 2}
    return InternVLVisionModel(transformers.InternVLVisionConfig(**sizes, **given))


def qwen2_vl() -> nn.Module:
    return Qwen2VisionTransformerPretrainedModel(
        Qwen2VLVisionConfig(depth=3, embed_dim=32, hidden_size=16, num_heads=4, mlp_ratio=2, patch_size=PATCH)
    )


def qwen2_5_vl() -> nn.Module:
    return Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VLVisionConfig(
            depth=3,
            hidden_size=32,
            intermediate_size=48,
            num_heads=4,
            patch_size=PATCH,
            out_hidden_size=16,
            window_size=4 * PATCH,
            fullatt_block_indexes=[1],
        )
    )


TWINS = {
    "clip": Twin("clip", clip, hidden_state(-2)),
    "clip_patches": Twin("clip", clip, lambda model, view: hidden_state(-1)(model, view)[1:]),
    "siglip": Twin("siglip", siglip, last),
    "siglip_inner": Twin("siglip", siglip, hidden_state(-2)),
    "idefics3": Twin("siglip", lambda: Idefics3VisionTransformer(Idefics3VisionConfig(**SIZES)), own_grid, False),
    "internvit_300m": Twin(
        "internvit", lambda: internvit(attention_bias=True), lambda model, view: own_grid(model, view)[1:]
    ),
    "internvit_6b": Twin(
        "internvit",
        lambda: internvit(attention_bias=False, use_qk_norm=True, norm_type="rms_norm"),
        lambda model, view: own_grid(model, view)[1:],
    ),
    "qwen2_vl": Twin("qwen2_vl", qwen2_vl, qwen),
    "qwen2_5_vl": Twin("qwen2_5_vl", qwen2_5_vl, qwen),
    "aimv2": Twin("aimv2", lambda: Ovis2VisionModel(Ovis2VisionConfig(**SIZES, vocab_size=16)), own_grid, False),
    "eva": Twin("eva", lambda: Blip2VisionModel(transformers.Blip2VisionConfig(**SIZES)), last),
}
"""By the names of `parts.TOWERS`."""


@functools.cache
def random_twin(name: str) -> Any:
    """transformers' class with weights that leave nothing at zero or one."""
    torch.manual_seed(0)
    model = TWINS[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def load(tower: VisionTower, name: str) -> None:
    """Through the table of names that `convert` uses."""
    cfg = parts.TOWERS[name]
    states = random_twin(name).state_dict()
    state = {n.removeprefix("vision_model.").removeprefix("transformer."): t for n, t in states.items()}
    sizes = Sizes(heads=cfg.num_heads, kv_heads=cfg.num_heads, patch=cfg.patch_size, frames=cfg.temporal_patch_size)
    pieces.load(tower, "vision", state, NAMES[TWINS[name].table].entries("vision", cfg, layers_used(cfg), sizes))


def pictures(patches: Tensor, grids: list[Grid], cfg: VisionConfig) -> list[Tensor]:
    """The views as transformers wants them: [3, H, W], colours normalised."""
    views, start = [], 0
    mean, std = torch.tensor(cfg.mean) * 255, torch.tensor(cfg.std) * 255
    for rows, columns in grids:
        cut = patches[start : start + rows * columns].view(rows, columns, PATCH, PATCH, 3)
        start += rows * columns
        image = (cut.permute(0, 2, 1, 3, 4).reshape(rows * PATCH, columns * PATCH, 3).float() - mean) / std
        views.append(image.permute(2, 0, 1).contiguous())
    return views
