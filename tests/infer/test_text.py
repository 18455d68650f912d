"""Text while it comes: together it is what decoding everything gives, and no piece ever has to be taken back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers

from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.text import BROKEN, Detokenizer, TextStream


@pytest.fixture(scope="session")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As Llama's: words with a leading space, bytes for what it has no token for."""
    folder = tmp_path_factory.mktemp("spaced")
    words = ["<pad>", "<s>", "</s>", "<image>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁b", "ab"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    fast = FastTokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(words[:4])
    fast.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return Tokenizer(folder)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = Detokenizer(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.finish()]


TEXT = st.text() | st.text("aé日😀 \n\ufffd")


@given(TEXT)
def test_bytes_become_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    found = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(found) == text
    if BROKEN not in text:
        assert not any(BROKEN in piece for piece in found)


@settings(max_examples=100)
@given(st.data())
def test_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Broken bytes and special tokens too; pieces are final, so together they are the text of all."""
    ids = data.draw(st.lists(st.integers(0, 270) | st.sampled_from(tokenizer.encode("日本😀é")), max_size=40))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.text("ab ") | st.text("ab é日😀"))
@example(" a b")
@example("  ab  b")
def test_leading_spaces(spaced: Tokenizer, text: str) -> None:
    ids = spaced.encode(text)
    found = pieces(spaced, ids)
    assert "".join(found) == spaced.decode(ids) == text
    assert not any(BROKEN in piece for piece in found)


def test_broken_bytes_of_a_llama_tokenizer_end_too(spaced: Tokenizer) -> None:
    a = spaced.encode("a")
    assert "".join(pieces(spaced, [*a, 4 + 0xE6, 4 + 0x97])) == f"a{BROKEN}{BROKEN}"
    found = pieces(spaced, [4 + 0xFF] * 50)
    assert "".join(found) == BROKEN * 50 and any(found[:10]), "not held back for ever"


def test_special_tokens_say_nothing_and_a_token_costs_the_same(tokenizer: Tokenizer) -> None:
    class Counting:
        special_ids = tokenizer.special_ids
        longest = 0

        def decode(self, ids: list[int]) -> str:
            self.longest = max(self.longest, len(ids))
            return tokenizer.decode(ids)

    for ids in ([2] * 500, tokenizer.encode("a red circle ") * 40, [130] * 500, tokenizer.encode("\ufffd") * 200):
        counting = Counting()
        assert "".join(pieces(counting, ids)) == tokenizer.decode(ids)  # type: ignore[arg-type]
        assert counting.longest <= 24


def streamed(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]) -> tuple[list[str], str | None]:
    stream, found = TextStream(tokenizer, stop), []
    for token in ids:
        text, hit = stream.push(token)
        found.append(text)
        if hit is not None:
            return found, hit
    text, hit = stream.finish()
    return [*found, text], hit


def first_stop(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """A character at a time: the first stop text that is complete, of those the longest."""
    for end in range(len(text) + 1):
        for each in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(each):
                return text[: end - len(each)], each
    return text, None


@settings(max_examples=100)
@given(
    st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=5), max_size=3).map(tuple), st.booleans()
)
@example("xabcd", ("abcd", "bc"), False)
@example("aab", ("ab",), True)
def test_stop_texts_wherever_tokens_end(tokenizer: Tokenizer, text: str, stop: tuple[str, ...], single: bool) -> None:
    ids = [i for c in text for i in tokenizer.encode(c)] if single else tokenizer.encode(text)
    found, hit = streamed(tokenizer, ids, stop)
    assert ("".join(found), hit) == first_stop(text, stop)


def test_only_what_could_become_a_stop_text_is_held_back(tokenizer: Tokenizer) -> None:
    ids = [i for c in "it <|e<|end|>" for i in tokenizer.encode(c)]
    assert streamed(tokenizer, ids, ("<|end|>",)) == (
        ["i", "t", " ", "", "", "", "<|e", "", "", "", "", "", ""],
        "<|end|>",
    )
    assert streamed(tokenizer, ids[:6], ("<|end|>",)) == (["i", "t", " ", "", "", "", "<|e"], None)


def test_a_stop_text_of_many_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found, hit = streamed(tokenizer, tokenizer.encode("日本😀 end"), ("😀",))
    assert ("".join(found), hit) == ("日本", "😀")
