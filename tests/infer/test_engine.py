"""Continuous batching gives what each request would get alone, from a model without any cache."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.infer.fakes import PER_IMAGE, NumpyBackend, ScriptBackend, Weights, pictures
from vlm_nemo.data.sample import BROKEN_IMAGE, SampleError
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.engine import Engine, Event, Prompt, RequestOutput, SamplingParams
from vlm_nemo.infer.sampling import Sampler
from vlm_nemo.types import Images, UserError


def prompt(tokenizer: Tokenizer, seed: int, text: int, images: int = 0) -> Prompt:
    """bos, each image after a token of text, then the rest of the text."""
    ids = np.random.default_rng(seed).integers(4, tokenizer.vocab_size, text).tolist()
    tokens = [tokenizer.bos_id]
    for i in range(images):
        tokens += [ids[i % text], *[tokenizer.image_id] * PER_IMAGE]
    return Prompt(tokens=tokens + ids, images=partial(pictures, seed, images), image_count=images)


def by_hand(weights: Weights, tokenizer: Tokenizer, asked: Prompt, params: SamplingParams, index: int = 0) -> list[int]:
    """A whole forward a token, nothing cached, nobody beside it."""
    sampler = Sampler(params, (params.seed or 0) + index)
    tokens, said = list(asked.tokens), []
    while len(said) < params.max_tokens:
        logits = weights.whole(tokens, asked.images())[: tokenizer.vocab_size]
        said.append(sampler.choose(logits, banned=tokenizer.image_id))
        if said[-1] == tokenizer.eos_id:
            break
        tokens.append(said[-1])
    return said


def ids(output: RequestOutput) -> list[list[int]]:
    return [answer.token_ids for answer in output.outputs]


def drain(engine: Engine) -> list[Event]:
    events = []
    while engine.busy:
        events += engine.step()
    return events


def broken() -> None:
    raise SampleError(BROKEN_IMAGE, "cut short")


@pytest.fixture
def engine(weights: Weights, tokenizer: Tokenizer) -> Engine:
    return Engine(NumpyBackend(weights), tokenizer, prefill_tokens=30)


@pytest.fixture
def mix(tokenizer: Tokenizer) -> tuple[list[Prompt], list[SamplingParams]]:
    """Uneven prompts and answers, greedy and sampled, without and with images."""
    shapes = [(1, 5, 0), (2, 17, 1), (3, 2, 2), (4, 40, 0), (5, 1, 1), (6, 9, 0), (7, 3, 3)]
    prompts = [prompt(tokenizer, *shape) for shape in shapes]
    params = [
        SamplingParams(temperature=0.0 if i % 2 else 1.2, seed=i, max_tokens=3 + 2 * i, n=1 + i % 3, top_k=40)
        for i in range(len(shapes))
    ]
    return prompts, params


def test_equals_one_whole_forward_a_token(
    engine: Engine, weights: Weights, tokenizer: Tokenizer, mix: tuple[list[Prompt], list[SamplingParams]]
) -> None:
    outputs = engine.generate(*mix)
    expected = [
        [by_hand(weights, tokenizer, asked, params, i) for i in range(params.n)]
        for asked, params in zip(*mix, strict=True)
    ]
    assert [ids(output) for output in outputs] == expected
    assert len({tuple(answer) for answers in expected for answer in answers}) > len(outputs), "they must differ"
    assert [output.prompt_token_ids for output in outputs] == [list(asked.tokens) for asked in mix[0]]
    for output in outputs:
        for answer in output.outputs:
            assert answer.text == tokenizer.decode(answer.token_ids)
            assert answer.finish_reason == ("stop" if answer.token_ids[-1] == tokenizer.eos_id else "length")


def test_mates_order_slots_and_prefill_do_not_matter(
    weights: Weights, tokenizer: Tokenizer, mix: tuple[list[Prompt], list[SamplingParams]]
) -> None:
    def answers(prompts: Sequence[Prompt], params: Sequence[SamplingParams], slots: int, prefill: int) -> list:
        return Engine(NumpyBackend(weights, slots), tokenizer, prefill_tokens=prefill).generate(prompts, params)

    prompts, params = mix
    together = answers(prompts, params, 16, 4096)
    assert answers(prompts, params, 2, 1) == together
    assert answers(prompts[::-1], params[::-1], 5, 50) == together[::-1]
    assert [answers([p], [q], 1, 8)[0] for p, q in zip(prompts, params, strict=True)] == together


def test_a_step_runs_the_backend_twice_at_most_and_bounds_new_prompts(engine: Engine, tokenizer: Tokenizer) -> None:
    backend = engine.backend
    assert isinstance(backend, NumpyBackend)
    long, short = SamplingParams(max_tokens=9, ignore_eos=True), SamplingParams(max_tokens=1)
    first = engine.add(prompt(tokenizer, 1, 50), long)  # longer than prefill_tokens: alone, but it runs
    for seed in range(2, 6):
        engine.add(prompt(tokenizer, seed, 11), short)
    assert (engine.running, engine.waiting) == (0, 5)
    assert {event.request for event in engine.step()} == {first}
    assert (engine.running, engine.waiting) == (1, 4) and engine.cache_usage == 51 / (3 * 96)
    seen = []
    while engine.busy:
        before = len(backend.runs)
        seen.append(len(engine.step()))
        runs = backend.runs[before:]
        assert len(runs) <= 2
        new = [sum(len(row.tokens) for row in run if row.start == 0) for run in runs]
        assert max(new) <= 30 and all(len({row.start == 0 for row in run}) == 1 for run in runs)
    assert seen[:2] == [3, 3], "two prompts of 12 tokens beside the running one, a step"
    assert (engine.running, engine.waiting, engine.cache_usage) == (0, 0, 0.0)


def test_more_answers_than_slots(engine: Engine, weights: Weights, tokenizer: Tokenizer) -> None:
    asked, calls = prompt(tokenizer, 4, 6, 1), []

    def images() -> Images[Any] | None:
        calls.append(1)
        return pictures(4, 1)

    params = SamplingParams(n=8, temperature=1.5, seed=-3, max_tokens=4)
    (output,) = engine.generate([replace(asked, images=images)], params)
    assert ids(output) == [by_hand(weights, tokenizer, asked, params, i) for i in range(8)]
    assert len({tuple(answer) for answer in ids(output)}) > 4 and calls == [1], "decoded once for all answers"
    single = engine.generate([asked], replace(params, n=1, seed=2))
    assert ids(single[0]) == [ids(output)[5]], "the answer 5 of seed -3 is the answer 0 of seed 2"


def test_seeds(engine: Engine, tokenizer: Tokenizer) -> None:
    asked, params = prompt(tokenizer, 4, 6), SamplingParams(temperature=1.5, seed=5, max_tokens=12, ignore_eos=True)
    same = [engine.generate([asked], params) for _ in range(2)]
    assert same[0] == same[1]
    fresh = [tuple(ids(engine.generate([asked], replace(params, seed=None))[0])[0]) for _ in range(3)]
    assert len(set(fresh)) == 3
    numbers = Engine(engine.backend, tokenizer, entropy=lambda: 5)
    assert numbers.generate([asked], replace(params, seed=None)) == same[0], "ranks may share their entropy"


def test_cancel_frees_slots_at_once(engine: Engine, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    first = engine.add(prompt(tokenizer, 1, 5), replace(params, n=3))
    second = engine.add(prompt(tokenizer, 2, 5), params)
    third = engine.add(prompt(tokenizer, 3, 5), params)
    engine.step()
    assert (engine.running, engine.waiting) == (3, 2)
    engine.cancel(first)
    engine.cancel(second)  # it had no slot yet
    assert (engine.running, engine.waiting) == (0, 1)
    events = engine.step()
    ended = [(e.request, e.index, e.finish_reason) for e in events if e.finish_reason]
    assert ended == [
        (first, 0, "cancelled"),
        (first, 1, "cancelled"),
        (first, 2, "cancelled"),
        (second, 0, "cancelled"),
    ]
    assert [e.request for e in events if not e.finish_reason] == [third]
    engine.cancel(first)  # over already
    engine.cancel(99)
    engine.cancel(third)
    assert engine.busy and engine.running == 0
    assert [e.finish_reason for e in engine.step()] == ["cancelled"] and not engine.busy


def test_eos_and_ignore_eos(tokenizer: Tokenizer) -> None:
    red, eos = tokenizer.encode("red"), tokenizer.eos_id
    engine = Engine(ScriptBackend(tokenizer.vocab_size, {1: [*red, eos, *red, eos, eos, eos]}), tokenizer)
    asked = Prompt(tokens=[1, 5])
    (output,) = engine.generate([asked], SamplingParams(max_tokens=9))
    (answer,) = output.outputs
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("red", [*red, eos], "stop")
    (output,) = engine.generate([asked], SamplingParams(max_tokens=2 * len(red) + 3, ignore_eos=True))
    (answer,) = output.outputs
    assert (answer.text, answer.finish_reason) == ("redred", "length") and answer.token_ids.count(eos) == 3
    (output,) = engine.generate([asked], SamplingParams(max_tokens=len(red)))
    assert output.outputs[0].finish_reason == "length" and output.outputs[0].logprobs is None


def test_stop_texts_across_tokens(tokenizer: Tokenizer) -> None:
    said = [i for c in "a circle <|end|> more" for i in tokenizer.encode(c)]  # a token a character
    engine = Engine(ScriptBackend(tokenizer.vocab_size, {1: said, 4: tokenizer.encode("ab cd")}), tokenizer)
    number = engine.add(Prompt(tokens=[1]), SamplingParams(max_tokens=21, stop=("<|end|>", "circles")))
    events = drain(engine)
    assert [e.request for e in events] == [number] * len(events)
    assert "".join(e.text for e in events) == "a circle " and events[-1].stop_reason == "<|end|>"
    assert all(e.text == "" for e in events[2:8]) and events[8].text == "circle ", "held back while it may be circles"
    assert (events[-1].finish_reason, len(events)) == ("stop", 16)
    (output,) = engine.generate([Prompt(tokens=[1])], SamplingParams(max_tokens=12, stop=["<|end|>"]))
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("a circle <|e", "length"), (
        "not a stop after all"
    )


def test_logprobs_are_those_of_the_raw_logits(engine: Engine, weights: Weights, tokenizer: Tokenizer) -> None:
    asked = prompt(tokenizer, 7, 6, 1)
    params = SamplingParams(
        temperature=0.7, top_k=5, seed=1, max_tokens=6, logprobs=3, presence_penalty=1.0, ignore_eos=True
    )
    (output,) = engine.generate([asked], params)
    (answer,) = output.outputs
    assert answer.logprobs is not None and [each.token_id for each in answer.logprobs] == answer.token_ids
    for i, each in enumerate(answer.logprobs):
        logits = weights.whole([*asked.tokens, *answer.token_ids[:i]], asked.images())[: tokenizer.vocab_size]
        exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
        assert each.logprob == pytest.approx(exact[each.token_id], abs=1e-5)
        best = np.argsort(-exact, kind="stable")[:3]
        assert [token for token, _ in each.top] == best.tolist()
        assert [value for _, value in each.top] == pytest.approx(exact[best].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("asked", "params", "says"),
    [
        (Prompt(tokens=[1] * 90), SamplingParams(max_tokens=7), "maximum context length is 96 tokens; a prompt of 90"),
        (Prompt(tokens=[]), SamplingParams(), "no tokens"),
        (Prompt(tokens=[1, 100_000]), SamplingParams(), "token 100000"),
        (Prompt(tokens=[1, -1]), SamplingParams(), "token -1"),
        (Prompt(tokens=[1, 3, 3]), SamplingParams(), "2 image placeholders for 0 images"),
        (Prompt(tokens=[1, 5], image_count=1), SamplingParams(), "0 image placeholders for 1 images"),
        (Prompt(tokens=[3, 5], image_count=2), SamplingParams(), "1 image placeholders for 2 images"),
        (Prompt(tokens=[3] * 12, image_count=3), SamplingParams(), r"At most 2 image\(s\) may be provided"),
        (Prompt(tokens=[1]), SamplingParams(temperature=3), "temperature"),
    ],
)
def test_what_could_never_be_answered_is_refused(
    weights: Weights, tokenizer: Tokenizer, asked: Prompt, params: SamplingParams, says: str
) -> None:
    engine = Engine(NumpyBackend(weights), tokenizer, image_limit=2)
    with pytest.raises(UserError, match=says):
        engine.add(asked, params)
    with pytest.raises(UserError, match=says):
        engine.generate([Prompt(tokens=[1]), asked], params)
    assert not engine.busy


def test_a_full_slot_works_to_its_last_token(engine: Engine, weights: Weights, tokenizer: Tokenizer) -> None:
    asked, params = prompt(tokenizer, 3, 79), SamplingParams(max_tokens=16, ignore_eos=True)
    (output,) = engine.generate([asked], params)
    assert len(output.outputs[0].token_ids) == 16 == 96 - len(asked.tokens)


def test_a_broken_image_ends_its_own_request_alone(engine: Engine, tokenizer: Tokenizer) -> None:
    good = [prompt(tokenizer, 1, 5, 1), prompt(tokenizer, 2, 5, 0)]
    bad = replace(prompt(tokenizer, 3, 5, 1), images=broken)
    fewer = replace(prompt(tokenizer, 3, 5, 2), images=lambda: pictures(0, 1))
    gone = replace(prompt(tokenizer, 3, 5, 1), images=lambda: open("/nowhere/a.png"))  # type: ignore[arg-type,return-value]
    misfit = Prompt(tokens=[1, *[tokenizer.image_id] * 3, 9], images=lambda: pictures(0, 1), image_count=1)
    params = SamplingParams(n=2, max_tokens=4)
    alone = engine.generate(good, params)
    outputs = engine.generate([good[0], bad, fewer, misfit, gone, good[1]], params)
    assert [outputs[0], outputs[-1]] == alone
    errors = [[answer.error for answer in output.outputs] for output in outputs[1:-1]]
    assert all(answer.finish_reason == "error" for output in outputs[1:-1] for answer in output.outputs)
    assert errors[0] == ["broken image: cut short"] * 2
    assert errors[1] == ["2 images were announced and 1 came"] * 2
    assert errors[2] == ["3 placeholders, 1 images of 4"] * 2, "the backend's refusal reaches only its request"
    assert "/nowhere/a.png" in str(errors[3][0])


def test_logits_that_are_no_numbers_end_the_answer(tokenizer: Tokenizer) -> None:
    class Broken(ScriptBackend):
        def run(self, rows: Sequence) -> np.ndarray:
            return np.full((len(rows), self.vocab), np.nan, np.float32)

    (output,) = Engine(Broken(tokenizer.vocab_size, {}), tokenizer).generate([Prompt(tokens=[1])], SamplingParams())
    assert output.outputs[0].finish_reason == "error" and "nan" in str(output.outputs[0].error)


def test_padding_of_the_head_and_the_placeholder_are_never_said(tokenizer: Tokenizer) -> None:
    class Tempting(ScriptBackend):
        def run(self, rows: Sequence) -> np.ndarray:
            logits = super().run(rows)
            logits[:, tokenizer.vocab_size :] = logits[:, tokenizer.image_id] = 99
            return logits

    for temperature in (0.0, 0.1):
        engine = Engine(Tempting(tokenizer.vocab_size + 9, {1: [7, 8, 9]}), tokenizer)
        (output,) = engine.generate([Prompt(tokens=[1])], SamplingParams(max_tokens=3, temperature=temperature, seed=0))
        assert ids(output) == [[7, 8, 9]]


def test_progress_and_params_one_each(engine: Engine, tokenizer: Tokenizer) -> None:
    prompts, counted = [prompt(tokenizer, seed, 4) for seed in range(5)], []
    params = [SamplingParams(max_tokens=i + 1, ignore_eos=True) for i in range(5)]
    outputs = engine.generate(prompts, params, counted.append)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3, 4, 5]
    assert sum(counted) == 5 and all(counted)
    with pytest.raises(UserError, match="5 prompts but 2 sampling params"):
        engine.generate(prompts, params[:2])
    assert engine.generate([], SamplingParams()) == []


ASKED = st.tuples(
    st.integers(1, 30), st.integers(0, 2), st.integers(1, 4), st.integers(1, 8), st.sampled_from([0.0, 1.5]),
    st.booleans(), st.integers(0, 4), st.none() | st.integers(0, 6),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(asked=st.lists(ASKED, min_size=1, max_size=6), slots=st.integers(1, 4), prefill=st.integers(1, 60))
def test_any_mix_ends_and_equals_each_alone(
    weights: Weights, tokenizer: Tokenizer, asked: list[tuple], slots: int, prefill: int
) -> None:
    """Requests come at any step and some are cancelled; the backend asserts its contract on every run."""
    engine = Engine(NumpyBackend(weights, slots), tokenizer, prefill_tokens=prefill)
    waiting, numbers, events, step = sorted(enumerate(asked), key=lambda a: a[1][6]), {}, [], 0
    while waiting or engine.busy:
        while waiting and waiting[0][1][6] <= step:
            i, (text, images, n, room, temperature, breaks, _, _) = waiting.pop(0)
            made = prompt(tokenizer, i, text, images)
            made = replace(made, images=broken) if breaks and images else made
            params = SamplingParams(n=n, temperature=temperature, seed=i, max_tokens=room)
            numbers[i] = (engine.add(made, params), made, params)
        for i, (number, _, _) in numbers.items():
            if asked[i][7] == step:
                engine.cancel(number)
        found = engine.step()
        events += found
        assert len({(e.request, e.index) for e in found}) == len(found), "at most one event an answer"
        assert engine.running <= slots and 0 <= engine.cache_usage <= 1
        step += 1
        assert step < 400, "every request must end"
    for number, made, params in numbers.values():
        for index in range(params.n):
            mine = [e for e in events if (e.request, e.index) == (number, index)]
            assert [e.finish_reason is not None for e in mine] == [False] * (len(mine) - 1) + [True]
            said = [token for e in mine for token in e.token_ids]
            if mine[-1].finish_reason == "error":
                assert made.images is broken and not said
            elif mine[-1].finish_reason == "cancelled":
                assert not said or said == by_hand(weights, tokenizer, made, params, index)[: len(said)]
            else:
                assert said == by_hand(weights, tokenizer, made, params, index)


NO_TORCH = """
import sys
from pathlib import Path
from typing import Any
sys.modules.update(torch=None, megatron=None)
from tests.infer import fakes
from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.infer.engine import Engine
from vlm_nemo.infer.llm import LLM
from types import SimpleNamespace
tokenizer = fakes.make_tokenizer(Path(sys.argv[1]))
engine = Engine(fakes.NumpyBackend(fakes.Weights(300, tokenizer.image_id)), tokenizer)
model = SimpleNamespace(tokenizer=tokenizer, template=TEMPLATES["short"], spec=fakes.SPEC, engine=engine)
assert LLM(model=model).chat([{"role": "user", "content": "what is this?"}])[0].outputs[0].token_ids
"""


def test_it_answers_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NO_TORCH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
