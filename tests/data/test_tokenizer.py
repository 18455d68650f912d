"""The tokenizer: lossless, deaf to special tokens in text, strict about what its folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers

from vlm_nemo.data.prepare.bpe import train_tokenizer
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a red circle", "two red squares </s> 12 34"] * 20, 300, folder)
    return folder


def change(source: Path, target: Path, name: str, edit: dict[str, object]) -> Path:
    Tokenizer(source).save(target)
    content = json.loads((target / name).read_text())
    (target / name).write_text(json.dumps(content | edit))
    return target


@pytest.fixture(scope="module")
def whole(trained: Path) -> Tokenizer:
    return Tokenizer(trained)


@given(st.text() | st.sampled_from(["</s>", "<image>", "<s> <pad></s>", "a red  circle\n12"]))
def test_decode_undoes_encode_and_text_is_never_special(whole: Tokenizer, text: str) -> None:
    ids = whole.encode(text)
    assert whole.decode(ids) == text
    assert not {whole.bos_id, whole.eos_id, whole.pad_id, whole.image_id} & set(ids)


def test_ids_and_size(trained: Path) -> None:
    tokenizer = Tokenizer(trained)
    ids = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id]
    assert ids == [0, 1, 2, 3] and tokenizer.vocab_size <= 300
    assert tokenizer.decode([1, *tokenizer.encode("red"), 3, 2, 0]) == "red"
    assert len(tokenizer.encode(" red")) == 1 and len(tokenizer.encode("34")) == 2, "words merge, digits do not"


def test_an_added_token_that_is_not_marked_special_is_deaf_too(trained: Path, tmp_path: Path) -> None:
    content = json.loads((trained / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    tokenizer = Tokenizer(change(trained, tmp_path, "tokenizer.json", content))
    assert tokenizer.image_id not in tokenizer.encode("<image>") and tokenizer.decode([3]) == ""


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("tokenizer_config.json", {"eos_token": None}, "eos"),
        ("tokenizer_config.json", {"pad_token": "<nowhere>"}, "pad .<nowhere>"),
        ("tokenizer_config.json", {"image_token": {"content": "<img>"}}, "image .<img>"),
        ("tokenizer.json", {"added_tokens": []}, "bos .*eos .*pad .*image"),
        ("tokenizer.json", {"model": {"type": "Nonsense"}}, "not a tokenizer"),
    ],
)
def test_a_missing_special_token_is_named(
    trained: Path, tmp_path: Path, name: str, edit: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Tokenizer(change(trained, tmp_path, name, edit))


def test_a_folder_without_files_and_a_vocabulary_too_small_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    with pytest.raises(UserError, match="tokenizer_vocab=200"):
        train_tokenizer(["a"], 200, tmp_path)


def test_a_tokenizer_that_prepends_a_space_does_not_double_it(tmp_path: Path) -> None:
    words = ["<pad>", "<s>", "</s>", "<image>", "▁", "▁a", "a", ":"]
    fast = FastTokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("▁", "a")]))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Metaspace()
    fast.add_special_tokens(words[:4])
    fast.save(str(tmp_path / "tokenizer.json"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode(" a") == [4, 5] and tokenizer.encode(" a", continues=True) == [5] == tokenizer.encode("a")


def test_transformers_reads_it_too(trained: Path) -> None:
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(str(trained))
    ours = Tokenizer(trained)
    assert theirs("a red circle", add_special_tokens=False).input_ids == ours.encode("a red circle")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    assert theirs.convert_tokens_to_ids("<image>") == ours.image_id and theirs("<image>").input_ids == [3]
