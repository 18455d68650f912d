"""A model in a few lines of Python, called as vLLM is. No torch here.

llm = LLM("runs/shapes/stage3")
prompt = {"prompt": "USER: <image>\\nWhat is this? ASSISTANT:", "multi_modal_data": {"image": "cat.jpg"}}
print(llm.generate(prompt, SamplingParams(max_tokens=20))[0].outputs[0].text)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vlm_nemo.data.chat import Template
from vlm_nemo.data.layout.spec import ImageSpec
from vlm_nemo.data.pieces import EncodedText
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.config import InferConfig
from vlm_nemo.infer.engine import Engine, Prompt, RequestOutput
from vlm_nemo.infer.images import ImageItem, decode_items, openai_messages, plan_items
from vlm_nemo.infer.prompts import chat_prompt, prompt_of, text_prompt
from vlm_nemo.infer.sampling import SamplingParams
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError

TextPrompt = str | Mapping[str, Any]
"""A text, or {"prompt": text, "multi_modal_data": {"image": one or a list of them}}."""


class Model(Protocol):
    """What is needed of `vlm_nemo.infer.load.LoadedModel`."""

    tokenizer: Tokenizer
    template: Template
    spec: ImageSpec
    engine: Engine


class LLM:
    """A model that answers in this process: a checkpoint of ours, a Hugging Face folder or an export bundle."""

    model: Model

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        model: Model | None = None,
        precision: str = "auto",
        infer: InferConfig | None = None,
    ) -> None:
        """Give a path, or a model that is open already. Raises UserError if there is nothing to open."""
        if model is None and path is not None:
            self.model = _open(Path(path), precision, infer or InferConfig())
        elif model is not None and path is None:
            self.model = model
        else:
            raise UserError("give LLM either a path or a model")

    def generate(
        self,
        prompts: TextPrompt | Sequence[TextPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[RequestOutput]:
        """Go on with each prompt, as it is: no template is put around it; bos comes first.

        sampling_params: for all, or one each; None = greedy. progress: as `Engine.generate` has it. Raises UserError
        for a prompt that cannot be answered, before any work; an image that cannot be decoded ends its own answers
        with finish_reason "error".
        """
        listed = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        asked, texts = [], []
        for prompt in listed:
            text, images = _text_and_images(prompt)
            found = text_prompt(text, plan_items(images, self.model.spec), self.model.tokenizer)
            asked.append(self._prompt(found, images))
            texts.append(text)
        outputs = self.model.engine.generate(asked, sampling_params or SamplingParams(), progress)
        return [replace(output, prompt=text) for output, text in zip(outputs, texts, strict=True)]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation of OpenAI's messages, or several; the model's own template is put around each.

        Raises UserError as `generate` does, and where the roles do not take turns or the user's is not the last.
        """
        several = bool(messages) and not isinstance(messages[0], Mapping)
        asked = []
        for conversation in messages if several else [messages]:
            turns, images = openai_messages(conversation)  # type: ignore[arg-type]
            plans = plan_items(images, self.model.spec)
            found = chat_prompt(turns, plans, self.model.tokenizer, self.model.template)
            asked.append(self._prompt(found, images))
        return self.model.engine.generate(asked, sampling_params or SamplingParams(), progress)

    def _prompt(self, text: EncodedText, images: Sequence[ImageItem]) -> Prompt:
        return prompt_of(text, partial(decode_items, images, self.model.spec))


def _text_and_images(prompt: TextPrompt) -> tuple[str, list[ImageItem]]:
    if isinstance(prompt, str):
        return prompt, []
    if unknown := set(prompt) - {"prompt", "multi_modal_data"}:
        raise UserError(f"a prompt has no {', '.join(sorted(unknown))}; its keys are prompt and multi_modal_data")
    text, data = prompt.get("prompt"), prompt.get("multi_modal_data") or {}
    if not isinstance(text, str):
        raise UserError(f"prompt must be a text, not {str(text)[:40]!r}")
    if unknown := set(data) - {"image"}:
        raise UserError(f"multi_modal_data has no {', '.join(sorted(unknown))}: this model takes image alone")
    images = data.get("image")
    if images is None:
        return text, []
    return text, list(images) if isinstance(images, list | tuple) else [images]


def _open(path: Path, precision: str, infer: InferConfig) -> Model:
    if not path.exists():
        raise UserError(f"there is no model at {path}")
    from vlm_nemo.infer.load import open_model  # brings torch, or a runtime, when a model is opened and not before

    bundle = (path / "manifest.json").is_file() and (path / "llm").is_dir()
    folder = (path / "config.json").is_file() and not bundle
    return open_model(
        checkpoint=None if bundle or folder else str(path),
        hf=str(path) if folder else None,
        export=str(path) if bundle else None,
        infer=infer,
        parallel=ParallelConfig(),
        precision=precision,
    )
