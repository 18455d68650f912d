"""What the model expects of an image: the sizes of its tower and how the layout cuts for it."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.types import UserError

ASPECTS = ("pad", "crop", "squash")


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Everything that decides into which views an image is cut, and how many embeddings they give."""

    layout: LayoutConfig
    """Not written to: a spec is the key of a cache."""
    size: int
    """Side of the square views, pixels."""
    patch: int
    """Side of one patch, pixels."""
    class_token: bool
    """Whether the tower's class token is an embedding too."""
    reduce: str
    """none | pixel_shuffle | merge | hidden_stride | average_pool: neighbours become one embedding."""
    factor: int
    """So many of them along each side."""
    queries: int | None
    """Embeddings a view whatever its grid (Q-Former, Perceiver); None = they follow from the grid."""
    mean: tuple[float, ...]
    """Mean colour, 0 to 1: the colour of the padding."""
    mrope: bool
    """Positions of an image are rows and columns of embeddings (Qwen2-VL)."""
    cross_attention: bool
    """The decoder looks at the image: one image token stands for it, and no embedding takes a place."""
    tiles: int | None = None
    """Tiles that the tower fills every image up to: embeddings of all of them, whatever the image's own (Llama 3.2)."""

    def __hash__(self) -> int:
        return hash((self.layout.kind, self.size, self.patch, self.reduce, self.factor, self.queries))

    @property
    def stride(self) -> int:
        """Pixels of an embedding's side, where every one stands for factor x factor patches."""
        return self.patch * self.factor

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a square view; pixels that fill no patch are left out (SigLIP: 384 / 14)."""
        return self.size // self.patch, self.size // self.patch


def image_spec(
    layout: LayoutConfig,
    *,
    size: int,
    patch: int,
    class_token: bool = False,
    reduce: str = "none",
    factor: int = 1,
    queries: int | None = None,
    mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    mrope: bool = False,
    cross_attention: bool = False,
    tiles: int | None = None,
) -> ImageSpec:
    """(…, size=336, patch=14) -> 576 embeddings a view. Raises UserError for sizes that do not go together."""
    if not 1 <= patch <= size:
        raise UserError(
            f"model.vision.patch_size={patch} must be at least 1 and at most model.vision.image_size={size}"
        )
    if layout.aspect not in ASPECTS:
        raise UserError(f"model.layout.aspect={layout.aspect} is unknown; choose one of {', '.join(ASPECTS)}")
    spec = ImageSpec(
        layout=layout,
        size=size,
        patch=patch,
        class_token=class_token,
        reduce=reduce,
        factor=1 if reduce == "none" else factor,
        queries=queries,
        mean=tuple(mean),
        mrope=mrope,
        cross_attention=cross_attention,
        tiles=tiles,
    )
    if spec.factor < 1:
        raise UserError(f"model.reduce.factor={factor} must be at least 1")
    if class_token and spec.factor > 1 and queries is None:
        raise UserError(
            f"model.vision.keep_class_token=true and model.reduce.kind={reduce} do not go together: a class token has "
            "no neighbours; drop the one or the other"
        )
    if tiles is not None and (layout.kind != "canvas" or layout.max_tiles != tiles):
        raise UserError(
            f"model.vision.tiles={tiles} is of images of so many tiles, but model.layout.kind={layout.kind} with "
            f"max_tiles={layout.max_tiles} makes others; set model.layout.kind=canvas and max_tiles={tiles}"
        )
    if layout.kind != "native":
        view_tokens(spec, spec.grid)
    return spec


def view_tokens(spec: ImageSpec, grid: tuple[int, int]) -> int:
    """Embeddings that a view of rows x columns patches gives: (24, 24) -> 576, halved by a 2 x 2 merge -> 144.

    Raises UserError where the reduction does not divide the grid.
    """
    if spec.queries is not None:
        return spec.queries
    rows, columns = reduced(spec, grid)
    return rows * columns + spec.class_token


def reduced(spec: ImageSpec, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of embeddings: (24, 24) -> (12, 12) with factor 2; hidden_stride fills an odd grid up.

    Raises UserError where the factor does not divide the grid.
    """
    rows, columns = grid
    if spec.reduce == "hidden_stride":
        return -(-rows // spec.factor), -(-columns // spec.factor)
    if rows % spec.factor or columns % spec.factor:
        raise UserError(
            f"model.reduce.factor={spec.factor} does not divide a view of {rows} x {columns} patches; change it, "
            "model.vision.image_size or model.vision.patch_size (model.reduce.kind=hidden_stride fills up with zeros)"
        )
    return rows // spec.factor, columns // spec.factor
