"""Labels against conversations that were labelled by hand, token by token."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from tests.data.tokenizers import make_tokenizer
from vlm_nemo.data.chat import TEMPLATES, Template, check_names, encode_conversation, encode_prompt, end_id
from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.layout.plan import NAME, ImagePlan, plain, run
from vlm_nemo.data.prepare.bpe import train_tokenizer
from vlm_nemo.data.sample import (
    BAD_JSON,
    IMAGE_WITHOUT_MARKER,
    MARKER_WITHOUT_IMAGE,
    NO_LABEL,
    Message,
    SampleError,
)
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import IGNORE_INDEX, UserError


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer that knows no merges: one token a byte, so that expectations can be written down."""
    folder = tmp_path_factory.mktemp("letters")
    train_tokenizer([], 260, folder)
    return Tokenizer(folder)


def chat(*contents: str, system: str | None = None) -> list[Message]:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for i, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return messages


def plans(*placeholders: int) -> list[ImagePlan]:
    """Images that are so many placeholders each."""
    return [plain(count) for count in placeholders]


def spell(tokenizer: Tokenizer, ids: list[int]) -> str:
    """One character a token: ^ bos, $ eos, # image, . ignored, else the byte itself."""
    names = {tokenizer.bos_id: "^", tokenizer.eos_id: "$", tokenizer.image_id: "#", IGNORE_INDEX: "."}
    return "".join(names[i] if i in names else tokenizer.decode([i]) for i in ids)


SPOKEN = Template(system="S", system_end=" ", user_start="U: ", user_end=" ", assistant_start="A:", assistant_lead=" ")

BY_HAND = [
    # template, messages, image tokens, tokens, labels
    (
        SPOKEN,
        chat("<image>\nhue?", "red"),
        [3],
        "^S U: ###\nhue? A: red$",
        "................. red$",
    ),
    (
        SPOKEN,
        chat("hue?<image>", "red", "and<image> this?", "blue", system="T"),
        [1, 2],
        "^T U: hue?# A: red$U: and## this? A: blue$",
        ".............. red$................. blue$",
    ),
    (SPOKEN, chat("hi", "yo"), [], "^S U: hi A: yo$", "........... yo$"),
    (TEMPLATES["plain"], chat("<image>", " a cat "), [2], "^##a cat$", "...a cat$"),
    # A document: an answer that nobody asked for
    (TEMPLATES["plain"], chat("", "a\n<image>\nb\n<image>\n<image>"), [2, 1, 1],
     "^a\n##\nb\n#\n#$", ".a\n..\nb\n.\n.$"),
    (TEMPLATES["plain"], chat("", "<image>\na"), [2], "^##\na$", "...\na$"),
    (TEMPLATES["short"], chat("<image><image>same?", "no", "why?", "hue"), [1, 2],
     "^###same?\nno$why?\nhue$", "..........no$.....hue$"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "messages", "images", "tokens", "labels"), BY_HAND)
def test_labels_by_hand(
    letters: Tokenizer, template: Template, messages: list[Message], images: list[int], tokens: str, labels: str
) -> None:
    found = encode_conversation(messages, letters, template, plans(*images))
    assert spell(letters, found.tokens) == tokens
    assert spell(letters, found.labels) == labels
    assert found.slots.tolist() == [i for i, letter in enumerate(tokens) if letter == "#"]
    assert found.sources.tolist() == list(range(sum(images))) and found.positions is None


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_prompt_is_the_exact_beginning_of_its_conversation(rich: Tokenizer, name: str) -> None:
    tokenizer = rich
    messages = chat("<image>\nWhat colour is it?", "red", "And <image> this?", "dark red 12")
    whole = encode_conversation(messages, tokenizer, TEMPLATES[name], plans(4, 5))
    tokens, labels = whole.tokens, whole.labels
    for turn, images in ((1, [4]), (3, [4, 5])):
        found = encode_prompt(messages[:turn], tokenizer, TEMPLATES[name], plans(*images))
        prompt = found.tokens
        assert tokens[: len(prompt)] == prompt
        assert whole.slots[: len(found.slots)].tolist() == found.slots.tolist()
        assert labels[len(prompt)] != IGNORE_INDEX and labels[len(prompt) - 1] == IGNORE_INDEX


def test_every_template_supervises_the_same_words(rich: Tokenizer) -> None:
    tokenizer = rich
    for template in TEMPLATES.values():
        labels = encode_conversation(chat("<image>\nhue?", "dark red"), tokenizer, template, plans(4)).labels
        kept = [label for label in labels if label != IGNORE_INDEX]
        assert kept[-1] == end_id(tokenizer, template) and tokenizer.decode(kept).strip() == "dark red"


@pytest.mark.parametrize(
    ("messages", "images", "reason", "detail"),
    [
        (chat("hue?", "red"), [4], IMAGE_WITHOUT_MARKER, "0 <image> in the text, 1 images"),
        (chat("<image><image>", "red"), [4], MARKER_WITHOUT_IMAGE, "2 <image> in the text, 1 images"),
        (chat("<image>", "a <image>"), [4], MARKER_WITHOUT_IMAGE, "2 <image> in the text, 1 images"),
        (chat("hue?", "  "), [], NO_LABEL, "empty"),
        (chat("hue?", "red", "shape?", ""), [], NO_LABEL, "empty"),
        (chat("", "<image>\n<image>"), [4, 4], NO_LABEL, "empty"),
        (chat("hue?"), [], NO_LABEL, "no assistant turn"),
        ([{"role": "assistant", "content": "red"}], [], BAD_JSON, "user, assistant"),
        ([], [], BAD_JSON, "none"),
    ],
)
def test_what_cannot_be_labelled_is_refused(
    tokenizer: Tokenizer, messages: list[Message], images: list[int], reason: str, detail: str
) -> None:
    with pytest.raises(SampleError, match=detail) as caught:
        encode_conversation(messages, tokenizer, TEMPLATES["vicuna"], plans(*images))
    assert caught.value.reason == reason


def test_a_prompt_ends_with_the_user(tokenizer: Tokenizer) -> None:
    with pytest.raises(SampleError, match="ends with the user"):
        encode_prompt(chat("hue?", "red"), tokenizer, TEMPLATES["short"], [])


def test_special_tokens_in_text_stay_text(letters: Tokenizer) -> None:
    tokens = encode_conversation(chat("</s><pad> <s>", "a</s>b"), letters, TEMPLATES["short"], []).tokens
    assert spell(letters, tokens) == "^</s><pad> <s>\na</s>b$"
    assert [t for t in tokens if t in letters.special_ids] == [letters.bos_id, letters.eos_id]
    assert letters.pad_id not in tokens and letters.image_id not in tokens


def test_a_special_token_that_is_lacking_is_named(letters: Tokenizer, rich: Tokenizer) -> None:
    layout = LayoutConfig(before="<img>")
    check_names(TEMPLATES["vicuna"], LayoutConfig(), letters)
    check_names(TEMPLATES["mistral"], LayoutConfig(), letters)  # <<SYS>> is text
    with pytest.raises(UserError, match=r"no special token <\|im_start\|>"):
        check_names(TEMPLATES["qwen"], LayoutConfig(), letters)
    check_names(TEMPLATES["qwen"], LayoutConfig(), rich)
    with pytest.raises(UserError, match="no special token <img>"):
        check_names(TEMPLATES["qwen"], layout, rich)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_user_never_says_a_special_token(rich: Tokenizer, name: str) -> None:
    template, said = (
        TEMPLATES[name],
        "".join(NAME.findall("".join(map(str, asdict(TEMPLATES[name]).values())))) + "</s>",
    )
    quiet, loud = (
        encode_conversation(chat(text, text, system=text), rich, template, []).tokens for text in ("hi", "hi" + said)
    )
    assert [t for t in loud if t in rich.special_ids] == [t for t in quiet if t in rich.special_ids]
    assert said in rich.decode(loud)


BRACKETS = ImagePlan(items=("<a>", run(0, 2), "x", run(2, 3)), before="b<s>", after="<a>c", embeddings=4)


def test_text_around_an_image_joins_its_neighbours(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, ["<a>"], vocab=260)
    found = encode_conversation(chat("u<image>v<image>", "red"), tokenizer, Template(), [BRACKETS, BRACKETS])
    special = tokenizer.special("<a>")
    shown = [tokenizer.bos_id, special, *[tokenizer.image_id] * 2, *tokenizer.encode("x"), tokenizer.image_id, special]
    expected = [
        *([tokenizer.bos_id, *tokenizer.encode("ub")]),
        *shown,
        *tokenizer.encode("cvb"),
        *shown,
        *tokenizer.encode("c"),
    ]
    assert found.tokens[: len(expected)] == expected
    assert tokenizer.decode(found.tokens[len(expected) :]) == "red"
    assert [found.tokens[slot] for slot in found.slots] == [tokenizer.image_id] * 6
    assert found.sources.tolist() == [0, 1, 2, 4, 5, 6], "the fourth embedding has no place, but counts"


def test_placeholders_never_carry_a_label(tokenizer: Tokenizer) -> None:
    messages = chat("<image>x", "one <image> two")
    found = encode_conversation(messages, tokenizer, TEMPLATES["plain"], plans(3, 5))
    tokens, labels = found.tokens, found.labels
    assert tokens.count(tokenizer.image_id) == 8
    assert all(label == IGNORE_INDEX for t, label in zip(tokens, labels, strict=True) if t == tokenizer.image_id)


def test_folder_of_the_tokenizer_is_not_needed_later(letters: Tokenizer, tmp_path: Path) -> None:
    letters.save(tmp_path / "copy")
    assert Tokenizer(tmp_path / "copy").encode("red") == letters.encode("red")
