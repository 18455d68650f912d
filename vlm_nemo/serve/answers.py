"""Events to what goes over the wire: OpenAI's chat completion, whole or in chunks."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.engine import Event, TokenLogprob
from vlm_nemo.serve.prompt import Prepared

DONE = "data: [DONE]\n\n"


class TokenTexts:
    """What a single token says, its leading space included."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Many tokenizers drop the space at a text's beginning: so decode behind something
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a")
        self._skip = len(tokenizer.decode(self._anchor))

    def __call__(self, token: int) -> str:
        """ "" for a special token, U+FFFD for a part of a character."""
        return self._tokenizer.decode([*self._anchor, token])[self._skip :]


class Answers:
    """The n answers to one request while they come."""

    def __init__(self, model: str, prepared: Prepared, texts: TokenTexts) -> None:
        self._id = f"chatcmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._model = model
        self._prepared = prepared
        self._texts = texts
        n = prepared.params.n
        self._text = [""] * n
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        self._finish: list[str | None] = [None] * n
        self._stop: list[str | None] = [None] * n
        self._tokens = 0
        self._begun: set[int] = set()

    @property
    def complete(self) -> bool:
        """All of them have ended."""
        return None not in self._finish

    def add(self, event: Event) -> None:
        """Take an event into the whole answer."""
        self._tokens += len(event.token_ids)
        self._text[event.index] += event.text
        self._logprobs[event.index] += [self._logprob(item) for item in event.logprobs]
        self._finish[event.index] = event.finish_reason
        self._stop[event.index] = event.stop_reason

    def whole(self) -> dict[str, Any]:
        """A chat.completion."""
        reported = self._prepared.params.logprobs is not None
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": {"content": self._logprobs[index], "refusal": None} if reported else None,
                "finish_reason": self._finish[index],
                "stop_reason": self._stop[index],
            }
            for index, text in enumerate(self._text)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage()}

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The chat.completion.chunk objects of an event; an answer's first one brings the role."""
        self.add(event)
        made = []
        if event.index not in self._begun:
            self._begun.add(event.index)
            made.append(self._chunk(event.index, {"role": "assistant", "content": ""}))
        logprobs = self._logprobs[event.index]
        self._logprobs[event.index] = []
        if event.text or logprobs:
            made.append(self._chunk(event.index, {"content": event.text}, logprobs=logprobs))
        if event.finish_reason is not None:
            made.append(self._chunk(event.index, {}, event=event))
        return made

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, with stream_options.include_usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens: each image counts as its placeholders, all n answers count."""
        prompt = len(self._prepared.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._tokens,
            "total_tokens": prompt + self._tokens,
            "prompt_tokens_details": {
                "cached_tokens": 0,
                "multimodal_tokens": {"image": self._prepared.image_tokens},
            },
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: list[dict[str, Any]] | None = None,
        event: Event | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
            "finish_reason": event.finish_reason if event else None,
        }
        if event is not None:
            choice["stop_reason"] = event.stop_reason
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _logprob(self, item: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in item.top]
        return {**self._token(item.token_id, item.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._texts(token)
        # JSON has no infinity: a token that cannot be chosen gets vLLM's number
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def sse(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"
