"""Train a small byte-level BPE tokenizer and save it the way Hugging Face does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vlm_nemo.types import IMAGE_MARKER, UserError

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "image_token": IMAGE_MARKER}
MIN_VOCAB = 256 + len(SPECIAL)
"""Every byte has a token, so that any text can be written."""


def train_tokenizer(texts: Iterable[str], vocab: int, folder: Path) -> int:
    """Train on `texts` and write tokenizer.json and tokenizer_config.json; returns the number of tokens.

    That number is below `vocab` if the texts have fewer words to merge. Digits stay apart, so that numbers are read
    digit by digit; decoding gives back exactly what was encoded. Raises UserError if vocab is below MIN_VOCAB.
    """
    if vocab < MIN_VOCAB:
        raise UserError(
            f"tokenizer_vocab={vocab} is too small; {MIN_VOCAB} are needed for the bytes and special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL,
        "additional_special_tokens": [IMAGE_MARKER],
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIAL.values()
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size(with_added_tokens=True)
