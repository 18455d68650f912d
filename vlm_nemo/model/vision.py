"""The vision tower: a transformer over patches. Views in, one vector a patch out. Read `VisionTower.forward`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_nemo.model.config import VisionConfig
from vlm_nemo.model.kernels import PLAIN, Kernels
from vlm_nemo.model.norm import Norm
from vlm_nemo.model.rope import table
from vlm_nemo.model.segments import Segments
from vlm_nemo.model.tiles import TileRows, Tiling
from vlm_nemo.model.transformer import ACTIVATIONS, transformer_config
from vlm_nemo.model.views import VisionBatch, runs, window_patches
from vlm_nemo.model.vision_layer import tower_spec
from vlm_nemo.runtime import groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError

NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
"""Our names of norms to megatron's."""


def layers_used(cfg: VisionConfig) -> int:
    """Layers that the chosen feature needs: hidden state -1 needs all, -2 all but the last. The rest is not built."""
    used = cfg.num_layers + 1 + cfg.feature_layer if cfg.feature_layer < 0 else cfg.feature_layer
    if not 0 < used <= cfg.num_layers:
        raise UserError(
            f"model.vision.feature_layer is {cfg.feature_layer}, but the tower has {cfg.num_layers} layers; "
            f"choose -1 (last) to -{cfg.num_layers}"
        )
    return used


class VisionTower(MegatronModule):
    """Views of P patches -> [N, D]. Split over `groups.vision_group()`; never over pipeline stages."""

    def __init__(
        self, cfg: VisionConfig, parallel: ParallelConfig, dtype: torch.dtype, kernels: Kernels = PLAIN
    ) -> None:
        check(cfg, parallel)
        width, layers = cfg.hidden_size, layers_used(cfg)
        sizes: dict[str, Any] = dict(
            recompute=parallel.recompute_vision,
            kernels=kernels,
            hidden_size=width,
            num_attention_heads=cfg.num_heads,
            ffn_hidden_size=cfg.ffn_hidden_size,
            activation_func=ACTIVATIONS[cfg.activation],
            gated_linear_unit=cfg.gated,
            normalization=NORMS[cfg.norm],
            layernorm_epsilon=cfg.norm_eps,
            add_bias_linear=cfg.bias,
            add_qkv_bias=cfg.qkv_bias,
        )
        config = transformer_config(
            parallel,
            dtype,
            pipelined=False,
            num_layers=layers,
            # Which layers stay within windows; how wide those are is said by the views.
            window_size=None if cfg.window is None else (cfg.window, cfg.window),
            window_attn_skip_freq=[int(n not in cfg.full_attention_layers) for n in range(layers)],
            **sizes,
        )
        super().__init__(config=config)
        self.cfg = cfg

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype))

        frames = (cfg.temporal_patch_size,) if cfg.temporal_patch_size > 1 else ()
        self.patch_weight = parameter(width, *frames, 3 * cfg.patch_size**2)
        self.patch_bias = parameter(width) if cfg.patch_bias else None
        self.patch_norm = Norm(config, width, cfg.norm_eps) if cfg.patch_norm else nn.Identity()
        self.class_token = parameter(width) if cfg.class_token else None
        places = (cfg.image_size // cfg.patch_size) ** 2 + int(cfg.class_token)
        self.position = parameter(places, width) if cfg.position == "learned" else None
        self.pre_norm = Norm(config, width, cfg.norm_eps) if cfg.pre_norm else nn.Identity()
        pgs = ProcessGroupCollection.use_mpu_process_groups()
        pgs.tp = groups.vision_group()
        spec = tower_spec(cfg, layers, kernels)
        self.blocks = TransformerBlock(config, spec, post_layer_norm=False, pg_collection=pgs)
        self.post_norm = Norm(config, width, cfg.norm_eps) if cfg.post_norm else nn.Identity()
        self.tiling = Tiling(cfg, config, places) if cfg.tiles is not None else None
        self.global_blocks = None
        if cfg.global_layers:
            further = transformer_config(parallel, dtype, pipelined=False, num_layers=cfg.global_layers, **sizes)
            spec = tower_spec(cfg, cfg.global_layers, kernels, gated=True)
            self.global_blocks = TransformerBlock(further, spec, post_layer_norm=False, pg_collection=pgs)
        self.register_buffer("mean", torch.tensor(cfg.mean) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(cfg.std) * 255, persistent=False)

    def forward(self, views: VisionBatch) -> Tensor:
        """[N, D]: the features of all views one after the other, in each the class token first where it is kept. Those
        of kept layers stand beside the last one's, channel by channel."""
        where, tiling = views.segments, self.tiling
        if tiling is None:
            x = self.pre_norm(self.embed(views))
        else:
            assert isinstance(where, TileRows)
            x = tiling.fill(self.pre_norm(self.embed_tiles(views)), where)
        turns = None if views.places is None else self.turns(views.places)
        x, kept = self.run(self.blocks, x, where, turns, self.cfg.kept_layers)
        x = self.post_norm(x)
        if tiling is not None:
            assert isinstance(where, TileRows)
            x = tiling.add_behind(x, where)
        if self.global_blocks is not None:
            x, _ = self.run(self.global_blocks, x, where, None)
        if kept:
            x = torch.cat((x, torch.stack(kept, dim=-1).flatten(1)), dim=1)
        if tiling is not None:
            assert isinstance(where, TileRows)
            return tiling.taken(x, where, self.cfg.keep_class_token)
        return x if views.out_rows is None else x.index_select(0, views.out_rows)

    def run(
        self,
        blocks: TransformerBlock,
        x: Tensor,
        where: Segments | TileRows,
        turns: Tensor | None,
        keep: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """[rows, D] through layers -> the same, and what the layers of `keep` gave."""
        given: dict[str, Any] = dict(attention_mask=None, rotary_pos_emb=turns, packed_seq_params=where)
        if not keep:
            return blocks(x.unsqueeze(1), **given).squeeze(1), []
        again = self.training and blocks.config.recompute_granularity == "full"
        kept, x = {}, x.unsqueeze(1)
        for n, layer in enumerate(blocks.layers):  # megatron's block gives the last one's output only

            def through(x: Tensor, layer: nn.Module = layer) -> Tensor:
                return layer(x, **given)[0]

            x = kept[n] = checkpoint(through, False, x) if again else through(x)
        return x.squeeze(1), [kept[n].squeeze(1) for n in keep]

    def embed_tiles(self, views: VisionBatch) -> Tensor:
        """[N, tiles, places, D]: patches, class tokens and learned positions of every tile, used or not."""
        assert self.tiling is not None and self.class_token is not None and self.position is not None
        assert isinstance(views.segments, TileRows)
        x = self.patch_norm(F.linear(self.normalise(views.patches), self.patch_weight, self.patch_bias))
        return self.tiling.embed(x, self.class_token, self.position, views.segments)

    def embed(self, views: VisionBatch) -> Tensor:
        """[rows of the tower, D]: patches and class tokens, learned positions added."""
        weight = self.patch_weight.sum(1) if self.cfg.temporal_patch_size > 1 else self.patch_weight
        x = self.patch_norm(F.linear(self.normalise(views.patches), weight, self.patch_bias))
        start = None if self.position is None or self.class_token is None else self.position[0]
        if self.position is not None:
            x = self.add_positions(x, self.position if start is None else self.position[1:], views)
        if views.patch_rows is None:
            return x
        rows = x.shape[0] if views.class_rows is None else x.shape[0] + views.class_rows.shape[0]
        out = x.new_empty(rows, x.shape[1]).index_copy(0, views.patch_rows, x)
        if views.class_rows is None:
            return out
        assert self.class_token is not None
        first = self.class_token if start is None else self.class_token + start
        return out.index_copy(0, views.class_rows, first.expand(views.class_rows.shape[0], -1))

    def normalise(self, patches: Tensor) -> Tensor:
        """[P, p*p*3] uint8 -> the same in the weights' type, mean colour 0."""
        pixels = (patches.view(patches.shape[0], -1, 3).float() - self.mean.float()) / self.std.float()
        return pixels.flatten(1).to(self.patch_weight.dtype)

    def add_positions(self, x: Tensor, table: Tensor, views: VisionBatch) -> Tensor:
        """Learned positions added to patches x [P, D], stretched for grids other than the table's [g*g, D]."""
        parts, row, width = [], 0, x.shape[1]
        for grid, count in runs(views.grids):
            patches = grid[0] * grid[1]
            added = table
            if grid in views.stretch:
                down, across = (m.to(table.dtype) for m in views.stretch[grid])
                square = table.view(down.shape[1], across.shape[1], width)
                added = torch.einsum("hg,gkd,wk->hwd", down, square, across).reshape(patches, width)
            block = x[row : row + count * patches].view(count, patches, width)
            parts.append((block + added).view(-1, width))
            row += count * patches
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def turns(self, places: Tensor) -> Tensor:
        """The table of 2-D rotary positions, [N, 2] -> [N, 1, 1, d]: a quarter of a head turns with the row, a quarter
        with the column, and the other half of it is what they turn against."""
        quarter = self.cfg.hidden_size // self.cfg.num_heads // 4
        exponent = torch.arange(quarter, dtype=torch.float32, device=places.device) / quarter
        angles = (places[:, :, None] * self.cfg.rope_base**-exponent).flatten(1)
        return table(angles[:, None, None], self.patch_weight.dtype)


def check(cfg: VisionConfig, parallel: ParallelConfig) -> None:
    """Refuse sizes that do not fit together. Raises UserError."""
    layers = layers_used(cfg)
    if cfg.post_norm and layers < cfg.num_layers:
        raise UserError(
            f"model.vision.post_norm is part of the last hidden state, but model.vision.feature_layer="
            f"{cfg.feature_layer} is an earlier one; set post_norm=false, or feature_layer=-1"
        )
    for key, size in {"num_heads": cfg.num_heads, "ffn_hidden_size": cfg.ffn_hidden_size}.items():
        if size % parallel.tensor:
            raise UserError(
                f"model.vision.{key}={size} is not a multiple of parallel.tensor={parallel.tensor}; "
                "choose another parallel.tensor"
            )
    if cfg.hidden_size % cfg.num_heads:
        raise UserError(
            f"model.vision.hidden_size={cfg.hidden_size} is not a multiple of model.vision.num_heads={cfg.num_heads}"
        )
    if cfg.position == "rope" and cfg.hidden_size // cfg.num_heads % 4:
        raise UserError(
            f"model.vision.position=rope needs heads of a multiple of 4 channels, but "
            f"model.vision.hidden_size={cfg.hidden_size} / num_heads={cfg.num_heads} is not one"
        )
    window_patches(cfg)
    if not all(0 <= n < layers for n in cfg.kept_layers):
        raise UserError(
            f"model.vision.kept_layers={list(cfg.kept_layers)} are not all among the {layers} layers that "
            f"model.vision.feature_layer={cfg.feature_layer} needs, counted from 0"
        )
    if cfg.tiles is None and cfg.global_layers:
        raise UserError(
            f"model.vision.global_layers={cfg.global_layers} are of a tower with tiles; set model.vision.tiles, or "
            "global_layers=0"
        )
    if cfg.tiles is not None:
        _check_tiles(cfg, cfg.tiles)


def _check_tiles(cfg: VisionConfig, tiles: int) -> None:
    """Refuse what a tower with tiles is not made for. Raises UserError."""
    wanted: dict[str, Any] = {"class_token": True, "position": "learned", "window": None, "temporal_patch_size": 1}
    for key, value in wanted.items():
        if (found := getattr(cfg, key)) != value:
            said, has = ("null" if x is None else str(x).lower() for x in (value, found))
            raise UserError(
                f"model.vision.tiles={tiles} goes with model.vision.{key}={said}, not with {has}; change it, or set "
                "model.vision.tiles=null"
            )
    if tiles < 1:
        raise UserError(f"model.vision.tiles={tiles}: the smallest is 1; null turns it off")
