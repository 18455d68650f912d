"""An image's pixels to patches, as its plan says. NumPy only; whoever calls brings the resizing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.data.layout.plan import Canvas, ImagePlan, Size

Pixels = NDArray[np.uint8]
Resize = Callable[[Pixels, int, int], Pixels]
"""(pixels [H, W, 3], height, width) -> [height, width, 3]"""


def cut(pixels: Pixels, plan: ImagePlan, patch: int, resize: Resize, out: Pixels) -> None:
    """[H, W, 3] -> out [P, p*p*3]: all views, one after the other. What is written is always a copy."""
    at = 0
    done: dict[tuple[Size, ...], Pixels] = {(): pixels}
    for canvas in plan.canvases:
        board = _board(done, canvas, resize)
        height, width = canvas.view
        for top in range(0, canvas.size[0], height):
            for left in range(0, canvas.size[1], width):
                at = _patches(board[top : top + height, left : left + width], patch, out, at)
    assert at == len(out), (at, out.shape)


def _patches(view: Pixels, patch: int, out: Pixels, at: int) -> int:
    """[H, W, 3] -> rows `at` and following of out; returns the row behind them."""
    rows, columns = view.shape[0] // patch, view.shape[1] // patch
    view = view[: rows * patch, : columns * patch]  # 384 pixels are 27 patches of 14
    end = at + rows * columns
    target = out[at:end].reshape(rows, columns, patch, patch, 3)
    target[:] = view.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 1, 3, 4)
    return end


def _board(done: dict[tuple[Size, ...], Pixels], canvas: Canvas, resize: Resize) -> Pixels:
    """The canvas with the image on it. done: what the image was resized to already, by the steps that led there."""
    if canvas.padded:
        return _padded(done[()], canvas, resize)
    for end in range(1, len(canvas.steps) + 1):
        if canvas.steps[:end] not in done:
            done[canvas.steps[:end]] = _to(done[canvas.steps[: end - 1]], *canvas.steps[end - 1], resize)
    image = done[canvas.steps]
    (top, left), (height, width) = canvas.corner, canvas.size
    image = image[max(0, -top) :, max(0, -left) :][:height, :width]
    if image.shape[:2] == (height, width):
        return image
    board = np.broadcast_to(np.array(canvas.colour, dtype=np.uint8), (height, width, 3)).copy()
    board[max(0, top) :, max(0, left) :][: image.shape[0], : image.shape[1]] = image
    return board


def _padded(pixels: Pixels, canvas: Canvas, resize: Resize) -> Pixels:
    """What padding to a square and then resizing gives, without making that square: the long side is resized first,
    then the short side is padded and resized."""
    size = canvas.size[0]
    height, width = pixels.shape[:2]
    colour = np.array(canvas.colour, dtype=np.uint8)
    if width > height:
        board = np.broadcast_to(colour, (width, size, 3)).copy()
        board[(width - height) // 2 :][:height] = _to(pixels, height, size, resize)
    else:
        board = np.broadcast_to(colour, (size, height, 3)).copy()
        board[:, (height - width) // 2 :][:, :width] = _to(pixels, size, width, resize)
    return _to(board, size, size, resize)


def _to(image: Pixels, height: int, width: int, resize: Resize) -> Pixels:
    return image if image.shape[:2] == (height, width) else resize(image, height, width)
