"""Token ids and pixels of every family beside transformers' own processor: same tokenizer, same conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.layout.published import as_content, render
from tests.data.layout.test_pixels import (
    COMMON,
    MEAN,
    PATCH,
    PINPOINTS,
    SIDE,
    SIZES,
    SQUARE,
    as_levels,
    opened,
    views,
)
from tests.data.raw_data import picture, pixels_of
from tests.data.tokenizers import make_tokenizer
from vlm_nemo.data.chat import TEMPLATES, encode_conversation, encode_prompt
from vlm_nemo.data.config import LayoutConfig
from vlm_nemo.data.image import decode_images, plan_images
from vlm_nemo.data.layout.images import plan_image
from vlm_nemo.data.layout.spec import image_spec
from vlm_nemo.data.layout.tiles import INDICATORS
from vlm_nemo.data.pieces import image_tokens
from vlm_nemo.data.sample import Message
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model.tiles import tilings
from vlm_nemo.types import Images

CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
ROWS = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]


@dataclass(frozen=True, kw_only=True)
class Family:
    template: str
    published: str
    layout: LayoutConfig
    build: Callable[[Any], Any]
    """(transformers' tokenizer) -> processor"""
    spec: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)
    """Special tokens that the processor asks the tokenizer for."""
    image: str = "<image>"
    """The placeholder."""
    marker: str = "<image>"
    """What the published template writes for an image."""
    line: bool = False
    """Whether it writes a line end behind it."""
    bos: str | None = None
    adds_bos: bool = False
    """The tokenizer puts bos first, not the template."""


def llava(tokenizer: Any) -> Any:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE, **COMMON)
    return LlavaProcessor(images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full")


def next_(tokenizer: Any) -> Any:
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, **COMMON
    )
    return LlavaNextProcessor(images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full")


def onevision(tokenizer: Any) -> Any:
    from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor

    images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS, **COMMON)
    return LlavaOnevisionProcessor(images, tokenizer, num_image_tokens=16, vision_feature_select_strategy="full")


def internvl(tokenizer: Any) -> Any:
    from transformers import GotOcr2ImageProcessorPil, InternVLProcessor

    images = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=6, **COMMON)
    return InternVLProcessor(images, tokenizer, image_seq_length=4)


def qwen(tokenizer: Any) -> Any:
    from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor

    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 40, **COMMON)
    return Qwen2VLProcessor(images, tokenizer)


def qwen25(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 40, **COMMON)
    return Qwen2_5_VLProcessor(images, tokenizer)


def ovis(tokenizer: Any) -> Any:
    from transformers import Ovis2ImageProcessorPil, Ovis2Processor

    images = Ovis2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=6, **COMMON)
    return Ovis2Processor(images, tokenizer, image_seq_length=4)


def gemma(tokenizer: Any) -> Any:
    from transformers import Gemma3ImageProcessorPil, Gemma3Processor

    return Gemma3Processor(Gemma3ImageProcessorPil(size=SQUARE, **COMMON), tokenizer, image_seq_length=4)


def idefics3(tokenizer: Any) -> Any:
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    tile = {"longest_edge": SIDE}
    images = Idefics3ImageProcessorPil(size={"longest_edge": 4 * SIDE}, max_image_size=tile, **COMMON)
    return Idefics3Processor(images, tokenizer, image_seq_len=4)


def mllama(tokenizer: Any) -> Any:
    from transformers import MllamaImageProcessorPil, MllamaProcessor

    return MllamaProcessor(MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4, **COMMON), tokenizer)


_NATIVE = LayoutConfig(
    kind="native", min_pixels=56 * 56, max_pixels=28 * 28 * 40, before="<|vision_start|>", after="<|vision_end|>"
)
_QWEN: dict[str, Any] = dict(
    template="qwen",
    published="qwen",
    layout=_NATIVE,
    spec=dict(reduce="merge", factor=2, mrope=True),
    names=[*CHATML, "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"],
    named={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    image="<|image_pad|>",
    marker="<|vision_start|><|image_pad|><|vision_end|>",
)
FAMILIES: dict[str, Family] = {
    "LLaVA-NeXT, Mistral": Family(
        template="mistral",
        published="mistral",
        layout=LayoutConfig(kind="anyres", pinpoints=PINPOINTS),
        build=next_,
        line=True,
        bos="<s>",
        adds_bos=True,
    ),
    "LLaVA-NeXT, Llama 3": Family(
        template="llama3",
        published="llama3",
        layout=LayoutConfig(kind="anyres", pinpoints=PINPOINTS),
        build=next_,
        names=LLAMA3,
        line=True,
        bos="<s>",
        adds_bos=True,
    ),
    "LLaVA-OneVision": Family(
        template="onevision",
        published="onevision",
        layout=LayoutConfig(kind="anyres", pinpoints=PINPOINTS, max_unpadded=9, tiles_if_alone=True),
        build=onevision,
        names=[*CHATML, "<video>"],
        line=True,
    ),
    "InternVL": Family(
        template="chatml",
        published="chatml",
        layout=LayoutConfig(kind="tiles", max_tiles=6, before="<img>", after="</img>"),
        spec=dict(reduce="pixel_shuffle", factor=2),
        build=internvl,
        names=[*CHATML, "<img>", "</img>", "<video>"],
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        image="<IMG_CONTEXT>",
        marker="<IMG_CONTEXT>",
        line=True,
    ),
    "Qwen2-VL": Family(build=qwen, **_QWEN),
    "Qwen2.5-VL": Family(build=qwen25, **_QWEN),
    "Ovis2": Family(
        template="qwen",
        published="ovis2",
        layout=LayoutConfig(kind="ovis", max_tiles=6),
        spec=dict(reduce="hidden_stride", factor=2),
        build=ovis,
        names=[*CHATML, *INDICATORS, "<image>"],
        image="<IMG_ATOM>",
        line=True,
    ),
    "Gemma 3": Family(
        template="gemma",
        published="gemma",
        layout=LayoutConfig(
            aspect="squash", resample="bilinear", before="\n\n<start_of_image>", after="<end_of_image>\n\n"
        ),
        spec=dict(reduce="average_pool", factor=2),
        build=gemma,
        names=["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"],
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        image="<image_soft_token>",
        marker="<start_of_image>",
        bos="<bos>",
    ),
    "Idefics3": Family(
        template="idefics3",
        published="idefics3",
        layout=LayoutConfig(kind="rows", longest_edge=4 * SIDE, resample="lanczos"),
        spec=dict(reduce="pixel_shuffle", factor=2),
        build=idefics3,
        names=["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *ROWS],
        bos="<|begin_of_text|>",
    ),
    "Llama 3.2 Vision": Family(
        template="llama32",
        published="llama32",
        layout=LayoutConfig(kind="canvas", max_tiles=4, resample="bilinear"),
        spec=dict(cross_attention=True, tiles=4),
        build=mllama,
        names=[*LLAMA3, "<|python_tag|>"],
        image="<|image|>",
        marker="<|image|>",
        bos="<|begin_of_text|>",
    ),
}


class Pair:
    """Our tokenizer and transformers' processor of one family."""

    def __init__(self, family: Family, folder: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        self.family = family
        self.ours = make_tokenizer(folder, family.names, image=family.image, bos=family.bos)
        theirs = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            bos_token=family.bos,
            eos_token="</s>",
            pad_token="<pad>",
            extra_special_tokens=family.named,
        )
        self.processor = family.build(theirs)
        self.spec = image_spec(family.layout, size=SIDE, patch=PATCH, mean=MEAN, **family.spec)

    def theirs(self, messages: list[Message], images: list[bytes], *, prompt: bool) -> dict[str, Any]:
        family = self.family
        shown = [{"role": m["role"], "content": as_content(m["content"], family.line)} for m in messages]
        marker = family.marker + ("\n" if family.line else "")
        if family.template == "onevision":
            marker = family.marker  # the line end belongs to the text
        text = render(family.published, shown, marker, family.bos or "", prompt=prompt)
        if family.adds_bos:
            text = (family.bos or "") + text
        # A list of lists, as a chat template hands them over: LLaVA-OneVision tells by it which belong together
        given = [[opened(data) for data in images]] if images else None
        found = self.processor(text=[text], images=given, return_tensors="np")
        return dict(found)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pair]]:
    from transformers.processing_utils import ProcessorMixin

    with pytest.MonkeyPatch.context() as patch:
        # Without torchvision there are no video processors, and this check looks for their class
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None)
        yield {name: Pair(family, tmp_path_factory.mktemp("family")) for name, family in FAMILIES.items()}


def conversation(family: Family, images: int) -> list[Message]:
    """Two turns; images at the beginning of the first one, as every published template can say it."""
    start = ("<image>\n" if family.line else "<image>") * images
    if family.template == "onevision" and images:
        start = "<image>" * images + "\n"
    return [
        {"role": "user", "content": f"{start}What is it? A red </s> circle?"},
        {"role": "assistant", "content": "A red circle, I think."},
        {"role": "user", "content": "user What?"},
    ]


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_the_familys(pairs: dict[str, Pair], name: str, count: int) -> None:
    pair = pairs[name]
    for size in SIZES[1:5] if count == 1 else SIZES[1:2]:
        images = [picture(i, size if i else (97, 101), "PNG") for i in range(count, 0, -1)]
        messages = conversation(pair.family, count)[:1]
        # A user's "</s>" is text to us and the end of the sequence to transformers
        messages[0]["content"] = messages[0]["content"].replace(" </s>", "")
        expected = pair.theirs(messages, images, prompt=True)
        plans = plan_images(images, pair.spec)
        found = encode_prompt(messages, pair.ours, TEMPLATES[pair.family.template], plans)
        assert found.tokens == expected["input_ids"][0].tolist()
        at = [i for i, token in enumerate(found.tokens) if token in _replaced(pair)]
        assert found.slots.tolist() == at and (pair.spec.cross_attention or len(found.sources) == len(at))
        whole = decode_images(images, found, pair.spec)
        _check_pixels(pair, whole, expected)
        assert whole.count == count and whole.slots is found.slots and len(whole.grids) == whole.views.sum()
        assert len(whole.patches) == whole.grids.prod(axis=1).sum()
        if pair.spec.tiles is not None and count:
            numbers = [1 + tilings(pair.spec.tiles).index((rows, columns)) for rows, columns in whole.tilings.tolist()]
            assert [numbers] == np.asarray(expected["aspect_ratio_ids"]).tolist()
            assert whole.views.tolist() == np.asarray(expected["aspect_ratio_mask"])[0].sum(axis=1).tolist()
        assert [image_tokens(plan, pair.ours) for plan in plans] == [
            len(encode_prompt(messages[:1], pair.ours, TEMPLATES[pair.family.template], plans).tokens)
            - len(encode_prompt(messages[:1], pair.ours, TEMPLATES[pair.family.template], _less(plans, i)).tokens)
            for i in range(count)
        ]


def _less(plans: list[Any], i: int) -> list[Any]:
    from vlm_nemo.data.layout.plan import plain

    return [*plans[:i], plain(0, plans[i].before, plans[i].after), *plans[i + 1 :]]


def _replaced(pair: Pair) -> set[int]:
    names = INDICATORS if pair.family.layout.kind == "ovis" else ()
    return {pair.ours.image_id, *(pair.ours.special(name) for name in names)}


def _check_pixels(pair: Pair, whole: Images[Any], expected: dict[str, Any]) -> None:
    if not whole.count or pair.family.layout.kind == "native":  # in its own order: test_pixels
        return
    found = np.asarray(expected["pixel_values"])
    cuts = np.cumsum(whole.grids.prod(axis=1))[:-1]
    single = [pixels_of(p, tuple(grid)) for p, grid in zip(np.split(whole.patches, cuts), whole.grids, strict=True)]
    ends = np.cumsum(whole.views)[:-1]
    ours = [single[end - count : end] for end, count in zip(np.cumsum(whole.views), whole.views, strict=True)]
    theirs = list(found)
    if pair.family.layout.kind == "canvas":
        theirs = list(found[0])
    elif pair.family.layout.kind in ("tiles", "ovis") or found.ndim == 4:
        theirs = np.split(found, ends)
    elif pair.family.layout.kind == "rows":
        theirs = np.split(found[0], ends)
    # Padding and resizing are one step of ours and two of theirs, which rounds in between
    within = 1.01 if pair.spec.layout.tiles_if_alone and whole.count > 1 else 0.01
    for mine, other in zip(ours, theirs, strict=True):
        for view, expected_view in zip(mine, as_levels(other), strict=False):  # theirs is filled up with blank views
            assert np.abs(view - expected_view).max() < within


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_is_the_familys_and_only_answers_count(pairs: dict[str, Pair], name: str) -> None:
    pair = pairs[name]
    template = TEMPLATES[pair.family.template]
    images = [picture(1, (97, 101), "PNG")]
    messages: list[Message] = [
        *conversation(pair.family, 1)[:2],
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "red"},
    ]
    messages[0]["content"] = messages[0]["content"].replace(" </s>", "")
    expected = pair.theirs(messages, images, prompt=False)["input_ids"][0].tolist()
    found = encode_conversation(messages, pair.ours, template, plan_images(images, pair.spec))
    if pair.family.template == "onevision":
        # The published one writes "assistant \n" before an answer that is given, "assistant\n" before one to generate
        written, said = pair.ours.encode("assistant \n"), pair.ours.encode("assistant\n")
        expected = _replace(expected, written, said)
    tail = expected[len(found.tokens) :]
    assert expected[: len(found.tokens)] == found.tokens
    assert pair.ours.decode(tail).strip() == "", "what stands behind the last answer"
    supervised = [label for label in found.labels if label != -100]
    end = pair.ours.special(template.assistant_end) if template.assistant_end else pair.ours.eos_id
    assert supervised.count(end) == 2 and supervised[-1] == end
    assert pair.ours.decode(supervised).split() == "A red circle, I think. red".split() or (
        pair.ours.decode(supervised).replace(" ", "") == "Aredcircle,Ithink.red"
    )


def _replace(ids: list[int], old: list[int], new: list[int]) -> list[int]:
    found: list[int] = []
    while ids:
        if ids[: len(old)] == old:
            found, ids = found + new, ids[len(old) :]
        else:
            found, ids = [*found, ids[0]], ids[1:]
    return found


@pytest.mark.parametrize(
    "name", ["LLaVA-NeXT, Mistral", "InternVL", "Qwen2-VL", "Gemma 3", "Idefics3", "Llama 3.2 Vision"]
)
def test_a_system_message_is_the_familys(pairs: dict[str, Pair], name: str) -> None:
    pair = pairs[name]
    messages: list[Message] = [{"role": "system", "content": "I think."}, {"role": "user", "content": "What?"}]
    expected = pair.theirs(messages, [], prompt=True)["input_ids"][0].tolist()
    assert encode_prompt(messages, pair.ours, TEMPLATES[pair.family.template], []).tokens == expected


def test_llava_counts_as_its_processor(tmp_path: Path) -> None:
    family = Family(
        template="vicuna", published="llava", layout=LayoutConfig(aspect="crop"), build=llava, line=True, bos="<s>"
    )
    pair = Pair(family, tmp_path)
    messages: list[Message] = [{"role": "user", "content": "<image>\nWhat?"}]
    data = picture(1, (97, 101), "PNG")
    expected = pair.theirs(messages, [data], prompt=True)
    found = encode_prompt(messages, pair.ours, TEMPLATES["vicuna"], plan_images([data], pair.spec))
    # Theirs has no system's words, which LLaVA-1.5 was trained with
    theirs = expected["input_ids"][0].tolist()
    assert found.tokens[-len(theirs) :] == theirs
    _check_pixels(pair, decode_images([data], found, pair.spec), expected)


@pytest.mark.parametrize("size", SIZES[1:4])
def test_blip2_images_stand_before_bos(tmp_path: Path, size: tuple[int, int]) -> None:
    from transformers import Blip2Processor, BlipImageProcessorPil, PreTrainedTokenizerFast

    ours = make_tokenizer(tmp_path, [])
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    from tokenizers import AddedToken

    processor = Blip2Processor(BlipImageProcessorPil(size=SQUARE, **COMMON), theirs, num_query_tokens=8)
    processor.image_token = AddedToken("<image>")
    data = picture(1, size, "PNG")
    expected = processor(images=opened(data), text="<s>Question: What is it? Answer:", return_tensors="np")
    spec = image_spec(LayoutConfig(aspect="squash"), size=SIDE, patch=PATCH, mean=MEAN, queries=8, class_token=True)
    messages: list[Message] = [{"role": "user", "content": "<image>\nWhat is it?"}]
    found = encode_prompt(messages, ours, TEMPLATES["blip2"], [plan_image(spec, size)])
    assert found.tokens == expected["input_ids"][0].tolist() and found.slots.tolist() == list(range(8))
    assert np.abs(views(data, spec)[0] - as_levels(expected["pixel_values"])[0]).max() < 0.01


def test_mrope_positions_are_qwens(pairs: dict[str, Pair]) -> None:
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    pair = pairs["Qwen2.5-VL"]
    tiny: dict[str, Any] = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    text = dict(tiny, num_key_value_heads=1, vocab_size=512, rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]})
    vision = dict(depth=1, hidden_size=8, num_heads=1, intermediate_size=8, out_hidden_size=8, patch_size=PATCH)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=pair.ours.image_id)
    model = Qwen2_5_VLForConditionalGeneration(config).model
    for sizes in ([(640, 480)], [(97, 101), (333, 517)], [(601, 37), (56, 56), (30, 450)]):
        images = [picture(1, size, "PNG") for size in sizes]
        messages = conversation(pair.family, len(sizes))[:1]
        messages[0]["content"] = messages[0]["content"].replace(" </s>", "")
        inputs = pair.theirs(messages, images, prompt=True)
        expected, _ = model.get_rope_index(
            torch.from_numpy(inputs["input_ids"]),
            mm_token_type_ids=torch.from_numpy(np.asarray(inputs["mm_token_type_ids"])),
            image_grid_thw=torch.from_numpy(inputs["image_grid_thw"]),
        )
        found = encode_prompt(messages, pair.ours, TEMPLATES["qwen"], plan_images(images, pair.spec))
        assert found.positions is not None
        assert np.array_equal(found.positions, expected[:, 0].numpy())
    assert encode_prompt(conversation(pair.family, 0)[:1], pair.ours, TEMPLATES["qwen"], []).positions is None


def test_a_tokenizer_without_bos(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, CHATML, bos=None)
    assert tokenizer.bos_id is None and Tokenizer(tmp_path).bos_id is None
    found = encode_prompt([{"role": "user", "content": "hi"}], tokenizer, TEMPLATES["chatml"], [])
    assert found.tokens[0] == tokenizer.special("<|im_start|>")
    plain = encode_prompt([{"role": "user", "content": "hi"}], tokenizer, TEMPLATES["plain"], [])
    assert plain.tokens == tokenizer.encode("hi")
