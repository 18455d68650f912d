"""Continuous batching: requests come and go between any two tokens, and each is answered as if it were alone.

    step   slot 0            slot 1            waiting
    1      prompt A -> a1    prompt B -> b1    C
    2      a1 -> a2          b1 -> eos, free   C
    3      a2 -> a3          prompt C -> c1

A step runs the backend at most twice: once for what is running, a token each, and once for the new prompts that then
have a slot. It owns slots, text and stopping; the backend owns the cache. No torch here.

Several ranks run an engine each and stay alike, because all it does is a function of the requests, of the logits,
which are the same on every rank, and of `entropy`, which must be.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.backend import Backend
from vlm_nemo.infer.pending import PendingAnswer, PendingRequest, have_images, prompt_row
from vlm_nemo.infer.request import Answer, Event, Prompt, RequestOutput, answer_of
from vlm_nemo.infer.sampling import Sampler, SamplingParams, TokenLogprob, fresh_entropy, token_logprob
from vlm_nemo.infer.text import TextStream
from vlm_nemo.types import UserError

__all__ = ["Answer", "Engine", "Event", "Prompt", "RequestOutput", "TokenLogprob"]


class Engine:
    """Answers requests, first come, first served, in as many slots as the backend has. One thread owns it."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        *,
        prefill_tokens: int = 4096,
        image_limit: int | None = None,
        ends: Collection[int] | None = None,
        entropy: Callable[[], int] = fresh_entropy,
    ) -> None:
        """prefill_tokens: of new prompts in one step, though always at least one prompt. image_limit: a prompt.

        ends: ids that end an answer; None = the tokenizer's eos. entropy: seeds the answers that have no seed; it must
        give the same numbers on every rank.
        """
        self.backend = backend
        self.tokenizer = tokenizer
        self.prefill_tokens = prefill_tokens
        self.image_limit = image_limit
        self._ends = frozenset((tokenizer.eos_id,) if ends is None else ends)
        self._entropy = entropy
        self._numbers = 0
        self._requests: dict[int, PendingRequest] = {}
        self._waiting: deque[PendingAnswer] = deque()
        self._running: dict[int, PendingAnswer] = {}
        self._free = list(range(backend.slots))  # a heap: low slots first, so that those in use lie side by side
        self._unreported: list[Event] = []

    @property
    def running(self) -> int:
        """Answers that have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Answers that have none yet."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self._requests or self._unreported)

    @property
    def cache_usage(self) -> float:
        """Share of the cache that holds tokens, 0 to 1."""
        return sum(s.cached for s in self._running.values()) / (self.backend.slots * self.backend.capacity)

    def check(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raises UserError for what could never be answered: wrong values, too many tokens or images."""
        params.validate()
        length, capacity = len(prompt.tokens), self.backend.capacity
        if not length:
            raise UserError("the prompt has no tokens")
        if length + params.max_tokens > capacity:
            raise UserError(
                f"This model's maximum context length is {capacity} tokens; a prompt of {length} tokens and "
                f"{params.max_tokens} new ones exceed it: shorten the prompt or lower max_tokens"
            )
        if min(prompt.tokens) < 0 or max(prompt.tokens) >= self.tokenizer.vocab_size:
            outside = next(t for t in prompt.tokens if not 0 <= t < self.tokenizer.vocab_size)
            raise UserError(f"the prompt holds token {outside}; the tokenizer has 0 to {self.tokenizer.vocab_size - 1}")
        if self.image_limit is not None and prompt.image_count > self.image_limit:
            raise UserError(f"At most {self.image_limit} image(s) may be provided in one prompt.")
        placeholders, images = list(prompt.tokens).count(self.tokenizer.image_id), prompt.image_count
        if bool(placeholders) != bool(images) or placeholders < images:
            raise UserError(f"the prompt has {placeholders} image placeholders for {images} images")
        if prompt.positions is not None and prompt.positions.shape != (3, length):
            raise UserError(f"the prompt has {length} tokens and positions of shape {prompt.positions.shape}")

    def add(self, prompt: Prompt, params: SamplingParams) -> int:
        """Queue a request; returns its number. Raises UserError as `check` does."""
        self.check(prompt, params)
        request = PendingRequest(number=self._numbers, prompt=prompt, params=params, unfilled=params.n)
        self._numbers += 1
        base = self._entropy() if params.seed is None else params.seed
        for index in range(params.n):
            text = TextStream(self.tokenizer, params.stop)
            sampler = Sampler(params, base + index)
            request.sequences.append(PendingAnswer(request=request, index=index, sampler=sampler, text=text))
        self._requests[request.number] = request
        self._waiting.extend(request.sequences)
        return request.number

    def cancel(self, request: int) -> None:
        """End what is left of a request; its slots are free at once, and the next step reports it "cancelled".

        Nothing happens to a request that is over already.
        """
        if request in self._requests:
            self._unreported += self._end_all(self._requests[request], "cancelled")
            self._waiting = deque(s for s in self._waiting if not s.over)

    def step(self) -> list[Event]:
        """One token for every running answer, then the first token of the new ones; at most one event an answer.

        An exception of the backend passes through, and the engine is not to be used after it.
        """
        events, self._unreported = self._unreported, []
        running = [self._running[slot] for slot in sorted(self._running)]
        if running:
            logits = self.backend.run([s.row for s in running])
            events += [self._advance(s, logits[i]) for i, s in enumerate(running)]
        admitted = list(self._admit(events))
        if admitted:
            events += self._prefill(admitted)
        return events

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Callable[[int], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, in their order; `params` for all, or one each. The engine must have nothing else to do.

        progress: called with the number of requests that a step finished. Raises UserError as `check` does, before
        any work; an image that cannot be decoded ends its own request alone, with finish_reason "error".
        """
        wishes = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(wishes) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(wishes)} sampling params; give one for all or one each")
        assert not self.busy, "the events of other requests would be lost"
        for prompt, wish in zip(prompts, wishes, strict=True):
            self.check(prompt, wish)
        numbers = [self.add(prompt, wish) for prompt, wish in zip(prompts, wishes, strict=True)]
        found: dict[tuple[int, int], list[Event]] = {}
        while self.busy:
            before = len(self._requests)
            for event in self.step():
                found.setdefault((event.request, event.index), []).append(event)
            if progress is not None and before > len(self._requests):
                progress(before - len(self._requests))
        return [
            RequestOutput(
                prompt_token_ids=list(prompt.tokens),
                outputs=[answer_of(found[number, i], wish.logprobs is not None) for i in range(wish.n)],
            )
            for number, prompt, wish in zip(numbers, prompts, wishes, strict=True)
        ]

    def _admit(self, events: list[Event]) -> Iterator[PendingAnswer]:
        """Give free slots to who waits longest; appends to `events` the requests whose images cannot be had."""
        used = 0
        while self._waiting and self._free:
            request = self._waiting[0].request
            if used and used + len(request.prompt.tokens) > self.prefill_tokens:
                return
            if (error := have_images(request)) is not None:
                events += self._end_all(request, "error", error)
                while self._waiting and self._waiting[0].over:
                    self._waiting.popleft()
                continue
            used += len(request.prompt.tokens)
            sequence = self._waiting.popleft()
            sequence.slot = heapq.heappop(self._free)
            self._running[sequence.slot] = sequence
            yield sequence

    def _prefill(self, admitted: list[PendingAnswer]) -> list[Event]:
        """Run the new prompts. Where the backend refuses what it was given, each by itself: one must not end all."""
        try:
            logits = self.backend.run([prompt_row(s) for s in admitted])
        except ValueError as error:
            if len(admitted) > 1:
                return [event for s in admitted if not s.over for event in self._prefill([s])]
            ended = self._end_all(admitted[0].request, "error", str(error))
            self._waiting = deque(s for s in self._waiting if not s.over)
            return ended
        for sequence in admitted:
            sequence.request.unfilled -= 1
            if not sequence.request.unfilled:
                sequence.request.images = None  # every answer has them in its cache
        return [self._advance(s, logits[i]) for i, s in enumerate(admitted)]

    def _advance(self, s: PendingAnswer, logits: NDArray[np.float32]) -> Event:
        """Choose the next token from logits [V]; end the answer if that was its last."""
        known = logits[: self.tokenizer.vocab_size]  # rows of the head beyond it are padding
        if not np.isfinite(known.max()):  # the maximum of anything with a NaN is NaN
            return self._end(s, "error", error=f"the highest of the model's logits is {known.max()}")
        params = s.request.params
        # A placeholder that the model said would stand for no image
        token = s.sampler.choose(known, banned=self.tokenizer.image_id)
        logprobs = () if params.logprobs is None else (token_logprob(known, token, params.logprobs),)
        s.last, s.said = token, s.said + 1
        text, stop = s.text.push(token)
        reason = None
        if stop is not None or (token in self._ends and not params.ignore_eos):
            reason = "stop"
        elif s.said == params.max_tokens:
            reason = "length"
        if reason is None:
            return Event(request=s.request.number, index=s.index, text=text, token_ids=(token,), logprobs=logprobs)
        if stop is None:
            rest, stop = s.text.finish()
            text += rest
            reason = "stop" if stop is not None else reason
        return self._end(s, reason, text=text, token_ids=(token,), logprobs=logprobs, stop_reason=stop)

    def _end(
        self,
        s: PendingAnswer,
        reason: str,
        *,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        stop_reason: str | None = None,
        error: str | None = None,
    ) -> Event:
        s.over = True
        if s.slot is not None:
            del self._running[s.slot]
            heapq.heappush(self._free, s.slot)
            s.slot = None
        if all(sequence.over for sequence in s.request.sequences):
            del self._requests[s.request.number]
        return Event(
            request=s.request.number,
            index=s.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            error=error,
        )

    def _end_all(self, request: PendingRequest, reason: str, error: str | None = None) -> list[Event]:
        return [self._end(s, reason, error=error) for s in request.sequences if not s.over]
