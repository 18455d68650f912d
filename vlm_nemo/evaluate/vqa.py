"""Exact match on held-out questions, by kind, beside two witnesses: chance, and the same questions, images swapped."""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from vlm_nemo.data.chat import encode_prompt
from vlm_nemo.data.sample import Message
from vlm_nemo.data.storage.folders import open_folder
from vlm_nemo.evaluate.config import EvaluateConfig
from vlm_nemo.infer import replicas
from vlm_nemo.infer.images import decode_items, plan_items
from vlm_nemo.infer.load import LoadedModel
from vlm_nemo.infer.prompts import prompt_of
from vlm_nemo.infer.sampling import SamplingParams
from vlm_nemo.types import UserError

log = logging.getLogger(__name__)

MAX_FAILED = 0.01
"""Share of questions that may go without an answer."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A held-out question: everything before the record's last assistant turn, and that turn as the truth."""

    kind: str
    messages: tuple[Message, ...]
    truth: str
    images: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question with what the model said."""

    question: Question
    answer: str

    @property
    def correct(self) -> bool:
        return matches(self.answer, self.question.truth)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Shares of exact matches by kind, 0 to 1."""

    accuracy: dict[str, float]
    swapped: dict[str, float]
    """The same questions about other questions' images: a model that looks falls to chance, one that guesses stays."""
    chance: dict[str, float]
    """What always giving the kind's commonest answer would score."""
    n: dict[str, int]


def normalise(answer: str) -> str:
    """Case, surrounding space and a final full stop do not count."""
    return answer.strip().rstrip(".").strip().casefold()


def matches(answer: str, truth: str) -> bool:
    return normalise(answer) == normalise(truth)


def read_questions(path: str, limit: int | None) -> list[Question]:
    """Questions of a prepared folder, the first `limit` of each kind.

    Raises UserError if a record does not end with an assistant turn.
    """
    folder = open_folder(path, key="evaluate.data")
    taken: Counter[str] = Counter()
    found = []
    for number in range(len(folder)):
        record = folder.record(number)
        kind = record.kind or "all"
        if limit is not None and taken[kind] >= limit:
            continue
        if record.messages[-1]["role"] != "assistant":
            raise UserError(
                f"{folder.key(number)} in {path} has no answer to compare with: its last turn is not assistant's"
            )
        taken[kind] += 1
        found.append(
            Question(
                kind=kind,
                messages=tuple(record.messages[:-1]),
                truth=record.messages[-1]["content"],
                images=tuple(folder.images(number)),
            )
        )
    return found


def swap_images(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """Every question with the images of the next one of its kind and number of images, in a shuffled ring.

    A question without images, or for which there are no others, is left out.
    """
    rings: dict[tuple[str, int], list[Question]] = defaultdict(list)
    for question in questions:
        if question.images:
            rings[question.kind, len(question.images)].append(question)
    swapped = []
    for key in sorted(rings):
        ring = rings[key]
        order = list(range(len(ring)))
        random.Random(f"{seed}/{key}").shuffle(order)
        for at, here in enumerate(order):
            q = ring[here]
            others = (ring[there].images for there in order[at + 1 :] + order[:at])
            if (images := next((found for found in others if found != q.images), None)) is not None:
                swapped.append(Question(kind=q.kind, messages=q.messages, truth=q.truth, images=images))
    return swapped


def answer_all(
    questions: Sequence[Question],
    model: LoadedModel,
    max_new_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy answer to every question. Raises UserError where too many have none (broken images, NaN)."""
    prompts = []
    for question in questions:
        plans = plan_items(question.images, model.spec)
        text = encode_prompt(list(question.messages), model.tokenizer, model.template, plans)
        prompts.append(prompt_of(text, partial(decode_items, question.images, model.spec)))
    params = SamplingParams(max_tokens=max_new_tokens)
    answers = [output.outputs[0] for output in replicas.generate(model, prompts, params, progress)]
    if failed := [answer for answer in answers if answer.finish_reason == "error"]:
        line = f"{len(failed)} of {len(answers)} questions have no answer, the first because of: {failed[0].error}"
        if len(failed) > MAX_FAILED * len(answers):
            raise UserError(line)
        if model.ranks is None or model.ranks.main:
            log.warning("%s; they count as wrong", line)
    return [answer.text.strip() for answer in answers]


def score(questions: Sequence[Question], answers: Sequence[str], swapped: Sequence[tuple[Question, str]]) -> Scores:
    """Count. Kinds are sorted; a kind without swapped answers has no entry there."""

    def shares(pairs: Sequence[tuple[Question, str]]) -> dict[str, float]:
        right: dict[str, list[bool]] = defaultdict(list)
        for question, answer in pairs:
            right[question.kind].append(matches(answer, question.truth))
        return {kind: sum(marks) / len(marks) for kind, marks in sorted(right.items())}

    truths: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        truths[question.kind][normalise(question.truth)] += 1
    return Scores(
        accuracy=shares(list(zip(questions, answers, strict=True))),
        swapped=shares(swapped),
        chance={kind: max(c.values()) / c.total() for kind, c in sorted(truths.items())},
        n={kind: c.total() for kind, c in sorted(truths.items())},
    )


def evaluate(
    cfg: EvaluateConfig,
    model: LoadedModel,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Scores, list[Answered]]:
    """Ask everything, twice if cfg.swap. Every rank returns the same. progress(done, total): for a bar."""
    if cfg.data is None:
        raise UserError("evaluate.data is not set: give the folder of held-out shards that prepare wrote")
    questions = read_questions(cfg.data, cfg.limit)
    others = swap_images(questions) if cfg.swap else []
    ranks = 1 if model.ranks is None else model.ranks.data
    done = 0

    def count(finished: int) -> None:
        nonlocal done
        done += finished
        if progress is not None:
            progress(done, (len(questions) + len(others)) // ranks)

    def ask(asked: Sequence[Question]) -> list[str]:
        return answer_all(asked, model, cfg.max_new_tokens, count)

    answers = ask(questions)
    swapped = list(zip(others, ask(others), strict=True)) if others else []
    records = [Answered(question=q, answer=a) for q, a in zip(questions, answers, strict=True)]
    return score(questions, answers, swapped), records
