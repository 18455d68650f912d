"""Two conversations, from a shard through the loader to tokens and labels, beside the same labelled by hand."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from tests.data.raw_data import SPEC, finish_folder, picture, write_all_lengths
from vlm_nemo.data.config import DataConfig, PackConfig, SourceConfig
from vlm_nemo.data.image import decode_image
from vlm_nemo.data.loader import Loader
from vlm_nemo.data.resize import torch_resize
from vlm_nemo.data.sample import ShardImage, ShardSample
from vlm_nemo.data.storage.write import write_shard
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import IGNORE_INDEX

TEXT_ONLY = [
    ("user", "What is 2 + 2?"),
    ("assistant", "4"),
    ("user", "And 3 + 3?"),
    ("assistant", " It is 6. "),
]
TWO_IMAGES = [
    ("system", "Be brief."),
    ("user", "<image>\nCompare with <image>, please."),
    ("assistant", "The second is red."),
    ("user", "Sure?"),
    ("assistant", "Yes."),
]

# (text, whether it is supervised), piece by piece as the vicuna template lays them out; "<s>" and "</s>" are the
# special tokens, "<image>" four placeholders. Every piece is tokenised by itself.
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
TEXT_ONLY_BY_HAND = [
    ("<s>", False),
    (VICUNA + "USER: What is 2 + 2? ASSISTANT:", False),
    (" 4", True),
    ("</s>", True),
    ("USER: And 3 + 3? ASSISTANT:", False),
    (" It is 6.", True),
    ("</s>", True),
]
TWO_IMAGES_BY_HAND = [
    ("<s>", False),
    ("Be brief. USER: ", False),
    ("<image>", False),
    ("\nCompare with ", False),
    ("<image>", False),
    (", please. ASSISTANT:", False),
    (" The second is red.", True),
    ("</s>", True),
    ("USER: Sure? ASSISTANT:", False),
    (" Yes.", True),
    ("</s>", True),
]


def by_hand(pieces: list[tuple[str, bool]], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens, and the token that each position predicts: the next one, where that is supervised."""
    special = {"<s>": [tokenizer.bos_id], "</s>": [tokenizer.eos_id], "<image>": [tokenizer.image_id] * 4}
    tokens: list[int] = []
    supervised: list[bool] = []
    for text, said in pieces:
        ids = special.get(text) or tokenizer.encode(text)
        tokens += ids
        supervised += [said] * len(ids)
    following = [*zip(tokens[1:], supervised[1:], strict=True), (0, False)]
    return tokens, [token if said else IGNORE_INDEX for token, said in following]


def test_conversations_come_out_as_labelled_by_hand(tmp_path: Path, tokenizer: Tokenizer) -> None:
    images = [picture(1, (64, 40)), picture(2, (30, 64), form="PNG")]
    samples = []
    for key, turns in (("text", TEXT_ONLY), ("images", TWO_IMAGES)):
        shown = [ShardImage(images[0], "jpg", 64, 40), ShardImage(images[1], "png", 30, 64)] if key == "images" else []
        messages = [{"role": role, "content": content} for role, content in turns]
        samples.append(ShardSample(key, messages, None, key, shown))  # type: ignore[arg-type]
    (tmp_path / "talk").mkdir()
    write_shard(tmp_path / "talk" / "00000.tar", samples)
    finish_folder(tmp_path / "talk", [2])

    cfg = DataConfig(
        sources={"talk": SourceConfig(path=str(tmp_path / "talk"))},
        shuffle=False,
        global_packs=1,
        pack=PackConfig(capacity=1024, pool=2),
    )
    for measured in (False, True):
        if measured:
            write_all_lengths(tmp_path, "vicuna", tokenizer)
        with closing(Loader(cfg, SPEC, tokenizer, seed=0, max_tokens=1024, dp_rank=0, dp_size=1)) as loader:
            batch = loader.next().batches[0]
        start = 0
        for pieces in (TEXT_ONLY_BY_HAND, TWO_IMAGES_BY_HAND):
            tokens, labels = by_hand(pieces, tokenizer)
            end = start + len(tokens)
            assert batch.tokens[start:end].tolist() == tokens
            assert batch.labels[start:end].tolist() == labels
            assert batch.positions[:, start:end].tolist() == [list(range(len(tokens)))] * 3
            start = end
        assert batch.used_tokens == start and batch.supervised == sum(
            sum(label != IGNORE_INDEX for label in by_hand(pieces, tokenizer)[1])
            for pieces in (TEXT_ONLY_BY_HAND, TWO_IMAGES_BY_HAND)
        )
        assert batch.images.count == 2
        for decoded, data in zip(batch.images.patches.split(4), images, strict=True):
            assert decoded.numpy().tolist() == decode_image(data, SPEC, torch_resize)[0].tolist()
        assert batch.tokens[batch.images.slots].tolist() == [tokenizer.image_id] * 8
        assert batch.images.sources.tolist() == list(range(8))
