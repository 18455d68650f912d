"""LLM as a user of vLLM would call it, on a stand-in model; images in every form that they come in."""

from __future__ import annotations

import base64
import io
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.infer.fakes import PLAN, SPEC, NumpyBackend, Weights
from vlm_nemo.data.chat import TEMPLATES, Template
from vlm_nemo.data.image import decode_image
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.sample import SampleError
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.engine import Engine
from vlm_nemo.infer.images import data_uri, decode_items, image_bytes, openai_messages, plan_items
from vlm_nemo.infer.llm import LLM
from vlm_nemo.infer.prompts import chat_prompt, prompt_of, text_prompt
from vlm_nemo.infer.sampling import SamplingParams
from vlm_nemo.types import UserError


@dataclass(kw_only=True)
class StandIn:
    """What LLM needs of a loaded model."""

    tokenizer: Tokenizer
    template: Template
    spec: ImageSpec
    engine: Engine


def decoded(llm: LLM, *items: Any) -> NDArray[np.uint8]:
    """[n, 4, 192]: the images' patches."""
    text = text_prompt("<image>" * len(items), plan_items(items, SPEC), llm.model.tokenizer)
    return decode_items(items, SPEC, text).patches.reshape(-1, 4, 192)


@pytest.fixture(scope="module")
def llm(weights: Weights, tokenizer: Tokenizer) -> LLM:
    engine = Engine(NumpyBackend(weights, capacity=400), tokenizer)
    return LLM(model=StandIn(tokenizer=tokenizer, template=TEMPLATES["short"], spec=SPEC, engine=engine))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8))


def png(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_one_image_in_every_form(llm: LLM, picture: Image.Image, tmp_path: Path) -> None:
    data = png(picture)
    (tmp_path / "a.png").write_bytes(data)
    items = [picture, data, tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(picture), uri(data)]
    made = decoded(llm, *items)
    assert made.shape == (6, 4, 192) and made.dtype == np.uint8
    expected, _ = decode_image(data, SPEC)
    assert all((each == expected).all() for each in made)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "F", "YCbCr", "RGBa"])
def test_pil_images_of_any_mode(llm: LLM, picture: Image.Image, mode: str) -> None:
    (made,) = decoded(llm, picture.convert("RGBA").convert(mode) if mode == "RGBa" else picture.convert(mode))
    expected, _ = decode_image(png(picture.convert("L" if mode in ("L", "F", "LA") else "RGB")), SPEC)
    if mode not in ("1", "P"):  # those lose colours
        assert np.abs(made - expected.astype(np.int64)).max() <= 3


def test_what_is_transparent_is_white(llm: LLM) -> None:
    (made,) = decoded(llm, Image.new("RGBA", (16, 16), (255, 0, 0, 0)))
    assert (made == 255).all()


def test_a_pil_image_is_turned_upright(llm: LLM, picture: Image.Image) -> None:
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(png(turned, exif=exif))) as opened:
        (made,) = decoded(llm, opened)
    assert (made == decode_image(png(picture), SPEC)[0]).all()


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (np.zeros((4, 4, 3), np.float32), r"image 0 is an array of float32 \(4, 4, 3\)"),
        (np.zeros((4, 4), np.uint8), "pixels are uint8"),
        ("/nowhere/a.png", "no file /nowhere/a.png"),
        (3, "image 0 is a int"),
        (None, "image 0 is a NoneType"),
    ],
)
def test_what_is_no_image_is_refused_at_once(item: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        plan_items([item], SPEC)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data:image/png;base64", "missing ',' separator"),
        ("data:text/plain,a", "Only base64 data URLs"),
        ("data:image/png;base64,a*", "not base64"),
    ],
)
def test_data_urls(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        data_uri(text)
    assert image_bytes(uri(b"abc")) == b"abc"


def test_generate(llm: LLM, picture: Image.Image) -> None:
    params = SamplingParams(max_tokens=5, n=2, logprobs=1, temperature=1.0, seed=0)
    prompts = [
        "what is this?",
        {"prompt": "a <image>?", "multi_modal_data": {"image": picture}},
        {"prompt": "<image><image>", "multi_modal_data": {"image": [picture, png(picture)]}},
        {"prompt": "a", "multi_modal_data": None},
    ]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == ["what is this?", "a <image>?", "<image><image>", "a"]
    model, counts = llm.model, [0, 1, 2, 0]
    for output, count in zip(outputs, counts, strict=True):
        assert output.prompt_token_ids == text_prompt(output.prompt or "", [PLAN] * count, model.tokenizer).tokens
        assert len(output.outputs) == 2
        for answer in output.outputs:
            assert answer.text == model.tokenizer.decode(answer.token_ids) and answer.logprobs is not None
            assert len(answer.logprobs) == len(answer.token_ids)
    assert llm.generate(prompts[1], params) == [outputs[1]], "one prompt without a list"
    assert len(llm.generate("a")[0].outputs[0].token_ids) <= 16
    direct = prompt_of(text_prompt("a <image>?", [PLAN], model.tokenizer), partial(decode_items, [picture], SPEC))
    assert model.engine.generate([direct], params)[0].outputs == outputs[1].outputs


def test_the_image_matters_and_a_broken_one_ends_its_own(llm: LLM, picture: Image.Image) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0)

    def asked(image: object) -> dict:
        return {"prompt": "a <image>?", "multi_modal_data": {"image": image}}

    inverted = Image.eval(picture, lambda value: 255 - value)
    one, bad, other = llm.generate([asked(picture), asked(png(picture)[:90]), asked(inverted)], params)
    assert one.outputs[0].logprobs != other.outputs[0].logprobs
    assert bad.outputs[0].finish_reason == "error" and str(bad.outputs[0].error).startswith("broken image")
    with pytest.raises(SampleError):
        decoded(llm, b"no image")


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("<image>", r"Found more '<image>' placeholders .* \(placeholders: 1, images: 0\)"),
        ({"prompt": "a", "multi_modal_data": {"image": [b"a", b"b"]}}, "Expected there to be 2 .* found 0 prompt"),
        ({"prompt": "a", "multi_modal_data": {"video": b"a"}}, "no video"),
        ({"prompt": "a", "images": b"a"}, "a prompt has no images"),
        ({"multi_modal_data": {}}, "prompt must be a text"),
    ],
)
def test_prompts_that_cannot_be(llm: LLM, prompt: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        llm.generate(prompt)


def test_chat(llm: LLM, picture: Image.Image) -> None:
    params, data = SamplingParams(max_tokens=4), png(picture)
    forms = [
        [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": uri(data)}}],
        [{"type": "image", "image": picture}, {"type": "text", "text": "what is this?"}],
        [{"type": "image_url", "image_url": uri(data)}, "<image>\nwhat is this?"],
    ]
    outputs = llm.chat([[{"role": "user", "content": form}] for form in forms], params)
    expected = [{"role": "user", "content": "<image>\nwhat is this?"}]
    tokens = chat_prompt(expected, [PLAN], llm.model.tokenizer, TEMPLATES["short"]).tokens  # type: ignore[arg-type]
    assert outputs[0].prompt_token_ids == tokens and outputs[0] == outputs[1] == outputs[2]
    assert llm.chat([{"role": "user", "content": forms[0]}], params) == outputs[:1], "one conversation"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert len(llm.chat(turns, params)) == 1


def test_images_without_a_marker_come_first() -> None:
    parts = [
        {"type": "text", "text": "this <image> or"},
        {"type": "image", "image": b"1"},
        {"type": "image", "image": b"2"},
    ]
    messages, images = openai_messages([{"role": "user", "content": [*parts, {"type": "text", "text": "that"}]}])
    assert messages == [{"role": "user", "content": "<image>\nthis <image> or\nthat"}] and images == [b"1", b"2"]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user", "content": "a <image>"}, r"Found more .* \(placeholders: 1, images: 0\)"),
        ({"role": "user", "content": [{"type": "audio"}]}, "Unsupported chat content part"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "Unsupported chat content part"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}, "data: URL"),
        ({"role": "user", "content": None}, "content of a message"),
        ({"content": "a"}, "a message is"),
        ({"role": "assistant", "content": "a"}, "turns must go user"),
    ],
)
def test_messages_that_cannot_be(llm: LLM, message: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        llm.chat([message])


def test_a_path_or_a_model() -> None:
    with pytest.raises(UserError, match="either a path or a model"):
        LLM()
    with pytest.raises(UserError, match="there is no model at /nowhere"):
        LLM("/nowhere")


def test_a_path_says_what_it_holds(tmp_path: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []

    def open_model(**options: object) -> object:
        asked.append(options)
        return llm.model

    monkeypatch.setitem(sys.modules, "vlm_nemo.infer.load", SimpleNamespace(open_model=open_model))  # type: ignore[arg-type]
    files = {"checkpoint": "step_000050/manifest.json", "hf": "config.json", "export": "llm/model.onnx"}
    for kind, name in files.items():
        path = tmp_path / kind / name
        path.parent.mkdir(parents=True)
        path.touch()
        if kind == "export":
            (tmp_path / kind / "manifest.json").touch()
            (tmp_path / kind / "config.json").touch()
        opened = LLM(tmp_path / kind, precision="fp32")
        assert opened.model is llm.model and asked[-1]["precision"] == "fp32"
        assert {k: asked[-1][k] for k in files} == {k: str(tmp_path / kind) if k == kind else None for k in files}
