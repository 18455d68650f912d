"""What several verbs do the same way: logging, the tokenizer against the model."""

from __future__ import annotations

import logging
import sys

from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.types import UserError


def set_up_logging(rank: int) -> None:
    """Warnings and errors to stderr, with the rank where there are several."""
    prefix = f"rank {rank}: " if rank else ""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format=f"{prefix}%(levelname)s: %(message)s")


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raises UserError where the tokenizer has ids that the embedding has no row for."""
    if tokenizer.vocab_size > model.language.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.language.vocab_size is "
            f"{model.language.vocab_size}; raise it to a multiple of 128 of at least {tokenizer.vocab_size}"
        )
