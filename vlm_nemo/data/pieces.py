"""Trusted text, in which special tokens stand by name, and images, to ids. Pure.

What a user wrote never comes here: it is tokenised with special tokens unknown (`Tokenizer.encode`).
"""

from __future__ import annotations

from vlm_nemo.data.layout.plan import ImagePlan
from vlm_nemo.data.tokenizer import Tokenizer


def encode_trusted(text: str, tokenizer: Tokenizer) -> list[int]:
    """ "<row_1_col_2>\\n" -> ids, the special token's first. Raises UserError for one that the tokenizer lacks."""
    ids: list[int] = []
    for piece in tokenizer.split(text):
        ids += [piece] if isinstance(piece, int) else tokenizer.encode(piece)
    return ids


def image_tokens(plan: ImagePlan, tokenizer: Tokenizer) -> int:
    """Tokens that stand for an image; `before` and `after` belong to the text."""
    if plan.cross:
        return 1
    return sum(
        len(encode_trusted(item, tokenizer)) if isinstance(item, str) else len(item.sources) for item in plan.items
    )
