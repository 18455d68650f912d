"""The vision tower: a CLIP-style transformer over patches. Images in, one vector a patch out."""

from __future__ import annotations

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_nemo.data.layout import ImageSpec, image_spec
from vlm_nemo.model.config import VisionConfig
from vlm_nemo.model.norm import Norm
from vlm_nemo.model.transformer import ACTIVATIONS, block_spec, transformer_config
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError


def layers_used(cfg: VisionConfig) -> int:
    """Layers that the chosen feature needs: hidden state -1 needs all, -2 all but the last. The rest is not built."""
    used = cfg.num_layers + 1 + cfg.feature_layer if cfg.feature_layer < 0 else cfg.feature_layer
    if not 0 < used <= cfg.num_layers:
        raise UserError(
            f"model.vision.feature_layer is {cfg.feature_layer}, but the tower has {cfg.num_layers} layers; "
            f"choose -1 (last) to -{cfg.num_layers}"
        )
    return used


def spec_of(cfg: VisionConfig) -> ImageSpec:
    """What the tower expects, in the data engine's words. Raises UserError if the patch does not divide the image."""
    kept = cfg.class_token and cfg.keep_class_token
    return image_spec(cfg.image_size, cfg.patch_size, kept, cfg.aspect, tuple(cfg.mean))


def output_tokens(cfg: VisionConfig) -> int:
    """Vectors an image gives the projector."""
    return spec_of(cfg).tokens


class VisionTower(MegatronModule):
    """[N, 3, H, W] uint8 -> [N, P, D]. Tensor parallel like the language model; never split over pipeline stages."""

    def __init__(self, cfg: VisionConfig, parallel: ParallelConfig, dtype: torch.dtype) -> None:
        config = transformer_config(
            parallel,
            dtype,
            pipelined=False,
            num_layers=layers_used(cfg),
            hidden_size=cfg.hidden_size,
            num_attention_heads=cfg.num_heads,
            ffn_hidden_size=cfg.ffn_hidden_size,
            activation_func=ACTIVATIONS[cfg.activation],
            normalization="LayerNorm",
            layernorm_epsilon=cfg.norm_eps,
            add_bias_linear=True,
            add_qkv_bias=True,
        )
        super().__init__(config=config)
        spec_of(cfg)  # refuses sizes that do not divide
        self.cfg = cfg
        grid = cfg.image_size // cfg.patch_size
        self.patch_weight = nn.Parameter(torch.empty(cfg.hidden_size, 3 * cfg.patch_size**2, dtype=dtype))
        self.position = nn.Parameter(torch.empty(grid**2 + int(cfg.class_token), cfg.hidden_size, dtype=dtype))
        if cfg.class_token:
            self.class_token = nn.Parameter(torch.empty(cfg.hidden_size, dtype=dtype))
        self.pre_norm = Norm(config, cfg.hidden_size, cfg.norm_eps) if cfg.pre_norm else nn.Identity()
        self.blocks = TransformerBlock(
            config, block_spec(layers_used(cfg), AttnMaskType.no_mask), post_layer_norm=False
        )
        self.register_buffer("mean", torch.tensor(cfg.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(cfg.std).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = ((images.float() - self.mean.float()) / self.std.float()).to(self.patch_weight.dtype)
        x = F.linear(patchify(pixels, self.cfg.patch_size), self.patch_weight)
        if self.cfg.class_token:
            x = torch.cat((self.class_token.expand(x.shape[0], 1, -1), x), dim=1)
        x = self.pre_norm(x + self.position)
        x = self.blocks(x.transpose(0, 1).contiguous(), attention_mask=None).transpose(0, 1)
        return x[:, 1:] if self.cfg.class_token and not self.cfg.keep_class_token else x


def patchify(images: Tensor, patch: int) -> Tensor:
    """[N, 3, H, W] -> [N, (H/p)(W/p), 3 p p]; rows of patches top to bottom, channels outermost inside a patch.

    A matrix product with a convolution's weight flattened as [D, 3 p p] then equals that convolution.
    """
    n, c, h, w = images.shape
    x = images.reshape(n, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(n, (h // patch) * (w // patch), c * patch * patch)
