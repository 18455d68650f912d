"""Tiles of one image that see one another in the tower: Llama 3.2 Vision's, with all that its weights know.

Every image takes the rows of a fixed number of tiles, its own first. Behind each tile's class token and patches there
are rows that fill it up to a multiple of 8. With 1 of 2 tiles used, and tiles of 1 + 4 rows that 3 fill up:

    rows     c p p p p | c p p p p | f f f f f f
    seen by  all         used rows   used rows

That a used row sees the others too, and those see used ones only, is what transformers' mask does (it hides what fills
from what fills, and nothing else); the published weights were used with it, so that these rows are computed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from vlm_nemo.model.attention import dense_attention
from vlm_nemo.model.config import VisionConfig

MULTIPLE = 8
"""Rows of a tile are filled up to a multiple of this."""


def tilings(most: int) -> list[tuple[int, int]]:
    """Rows and columns of up to `most` tiles, in the order of their numbers, which count from 1.

    4 -> (1, 1) (1, 2) (1, 3) (1, 4) (2, 1) (2, 2) (3, 1) (4, 1)
    """
    return [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]


@dataclass(kw_only=True)
class TileRows(PackedSeqParams):
    """Where the images' rows lie; stands where Segments stands in other towers. N images, V tiles used in all."""

    arrangement: Tensor
    """[N] int64: number of each image's tiling, from 1"""
    used: Tensor
    """[V] int64: which of the N x tiles each used one is"""
    own: tuple[int, ...]
    """Used tiles of every image."""
    tiles: int
    """Of every image, used or not."""
    places: int
    """Rows of a tile: class token and patches."""

    @property
    def filling(self) -> int:
        """Rows that fill a tile up."""
        return -self.places % MULTIPLE

    @property
    def rows(self) -> int:
        """Of an image."""
        return self.tiles * (self.places + self.filling)

    def moved(self, move: Callable[[Tensor], Tensor]) -> TileRows:
        """The same, every tensor through `move`."""
        return TileRows(
            qkv_format=self.qkv_format,
            arrangement=move(self.arrangement),
            used=move(self.used),
            own=self.own,
            tiles=self.tiles,
            places=self.places,
        )


def tile_rows(tiling: Tensor, tiles: int, places: int) -> TileRows:
    """tiling: [N, 2] rows and columns of tiles. Raises ValueError for one that no weights are for."""
    known = tilings(tiles)
    numbers: list[int] = []
    used: list[int] = []
    for image, (rows, columns) in enumerate(tiling.tolist()):
        if (rows, columns) not in known:
            raise ValueError(f"an image of {rows} x {columns} tiles; the tower takes {tiles} tiles at most")
        numbers.append(1 + known.index((rows, columns)))
        used += range(image * tiles, image * tiles + rows * columns)
    own = tuple(rows * columns for rows, columns in tiling.tolist())
    return TileRows(
        qkv_format="sbhd",  # see segments.py
        arrangement=torch.tensor(numbers),
        used=torch.tensor(used),
        own=own,
        tiles=tiles,
        places=places,
    )


class Tiling(MegatronModule):
    """The learned vectors of a tile's place in its image, and rows of all images from patches."""

    def __init__(self, cfg: VisionConfig, config: TransformerConfig, places: int) -> None:
        super().__init__(config=config)
        assert cfg.tiles is not None
        self.tiles, self.places, self.width = cfg.tiles, places, cfg.hidden_size
        kinds = 1 + len(tilings(cfg.tiles))  # number 0 is of no image: published, and never used

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=config.params_dtype))

        self.before = parameter(kinds, cfg.tiles * self.width)
        self.before_gate = parameter(1)
        self.position = parameter(kinds, cfg.tiles * places * self.width)
        self.position_gate = parameter(1)
        self.behind = parameter(kinds, cfg.tiles * self.width)
        self.behind_gate = parameter(1)

    def embed(self, x: Tensor, class_token: Tensor, position: Tensor, where: TileRows) -> Tensor:
        """Patches of the used tiles [P, D] -> [N, tiles, 1 + patches, D]; position: [1 + patches, D], a tile's own."""
        images, patches = len(where.own), where.places - 1
        tiles = x.new_zeros(images * self.tiles, patches, self.width)
        tiles = tiles.index_copy(0, where.used, x.view(-1, patches, self.width))
        tiles = tiles.view(images, self.tiles, patches, self.width) + self._of(self.before, self.before_gate, where)
        first = class_token.expand(images, self.tiles, 1, -1)
        gate = self.position_gate.tanh()
        # The blank view of a row without images has fewer patches than a tile; the table's first rows do for it
        table = self.position[where.arrangement].view(images, self.tiles, self.places, self.width)
        rows = torch.cat((first, tiles), dim=2) + (1 - gate) * position[: where.places]
        return rows + gate * table[:, :, : where.places]

    def fill(self, x: Tensor, where: TileRows) -> Tensor:
        """[N, tiles, places, D] -> [N rows, D]: with the rows that fill up, zeros."""
        images = len(where.own)
        rest = x.new_zeros(images, self.tiles * where.filling, self.width)
        return torch.cat((x.flatten(1, 2), rest), dim=1).view(-1, self.width)

    def add_behind(self, x: Tensor, where: TileRows) -> Tensor:
        """[N rows, D]: the second vectors of the tiles added, to the rows that fill up as well."""
        images, own = len(where.own), self.tiles * where.places
        x = x.view(images, where.rows, self.width)
        added = self._of(self.behind, self.behind_gate, where)
        tiles, rest = x[:, :own], x[:, own:]
        tiles = tiles.unflatten(1, (self.tiles, where.places)) + added
        rest = rest.unflatten(1, (self.tiles, where.filling)) + added
        return torch.cat((tiles.flatten(1, 2), rest.flatten(1, 2)), dim=1).view(-1, self.width)

    def taken(self, x: Tensor, where: TileRows, keep_class_token: bool) -> Tensor:
        """[N rows, D'] -> [N tiles places, D']: without the rows that fill up, and the class tokens where not kept."""
        own = x.view(len(where.own), where.rows, -1)[:, : self.tiles * where.places]
        if not keep_class_token:
            own = own.unflatten(1, (self.tiles, where.places))[:, :, 1:].flatten(1, 2)
        return own.flatten(0, 1)

    def _of(self, table: Tensor, gate: Tensor, where: TileRows) -> Tensor:
        """[N, tiles, 1, D]"""
        found = table[where.arrangement].view(len(where.own), self.tiles, 1, self.width)
        return gate.tanh() * found


class TileAttention(nn.Module):
    """Core attention of a tower with tiles. q, k, v: [rows, 1, heads, d] -> [rows, 1, heads * d]."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: TileRows,
    ) -> Tensor:
        assert attention_mask is None and attention_bias is None, "who sees whom is said by the rows"
        out, where = [], packed_seq_params
        for image, own in enumerate(where.own):
            start = image * where.rows
            used, end = start + own * where.places, start + where.rows
            out.append(dense_attention(query[start:used], key[start:end], value[start:end], False, self.scale))
            if used < end:
                k, v = key[start:used], value[start:used]
                out.append(dense_attention(query[used:end], k, v, False, self.scale))
        return torch.cat(out)
