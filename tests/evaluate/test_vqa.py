"""The scores and their two witnesses, by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from vlm_nemo.evaluate import vqa
from vlm_nemo.evaluate.gallery import choose
from vlm_nemo.evaluate.vqa import Answered, Question, matches, score, swap_images
from vlm_nemo.infer import replicas
from vlm_nemo.infer.engine import Answer, RequestOutput
from vlm_nemo.types import UserError
from vlm_nemo.verbs.evaluate import score_table


def question(kind: str, truth: str, *images: bytes) -> Question:
    return Question(kind=kind, messages=({"role": "user", "content": "?"},), truth=truth, images=images)


def test_what_counts_as_equal() -> None:
    assert matches(" Red. ", "red") and matches("two", "Two")
    assert not matches("red circle", "red") and not matches("", "red")


def test_a_kind_is_shown_as_the_data_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    scores = score([question("[count]", "two", b"2"), question("[/b]", "a", b"1")], ["two", "b"], [])
    Console(width=100).print(score_table(scores))
    assert {"[count]", "[/b]"} <= set(capsys.readouterr().out.split())


def test_scores_by_hand() -> None:
    asked = [question("colour", t, b"1") for t in ("red", "red", "blue", "green")] + [question("count", "two", b"2")]
    found = score(asked, ["red", "blue", "Blue.", "green", "three"], [(asked[0], "red"), (asked[1], "blue")])
    assert found.accuracy == {"colour": 0.75, "count": 0.0}
    assert found.chance == {"colour": 0.5, "count": 1.0}
    assert found.swapped == {"colour": 0.5}
    assert found.n == {"colour": 4, "count": 1}


def test_swapped_images_are_another_question_s_of_the_same_kind() -> None:
    asked = [question("a", str(i), bytes([i])) for i in range(9)]
    asked += [question("b", str(i), bytes([100 + i]), b"x") for i in range(5)] + [question("a", "text only")]
    swapped = swap_images(asked)
    assert len(swapped) == 14
    own = {(q.kind, q.truth): q.images for q in asked}
    for q in swapped:
        assert q.images != own[q.kind, q.truth]
        assert any(q.images == other.images for other in asked if other.kind == q.kind)


def test_the_same_image_is_no_swap() -> None:
    assert swap_images([question("a", "1", b"same"), question("a", "2", b"same")]) == []
    three = swap_images([question("a", "1", b"same"), question("a", "2", b"same"), question("a", "3", b"other")])
    assert sorted(q.truth for q in three) == ["1", "2", "3"]


@pytest.mark.parametrize("count", [0, 3, 50])
def test_the_gallery_shows_every_kind_in_turn(count: int) -> None:
    records = [Answered(question=question(kind, "t", b"1"), answer="t") for kind in "aaaabbc"]
    shown = choose(records, count)
    assert len(shown) == min(count, 7)
    assert [r.question.kind for r in shown[:3]] == ["a", "b", "c"][: min(count, 3)]


def test_questions_without_an_answer_are_not_silently_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def answered(failed: int, of: int) -> None:
        def generate(model: Any, prompts: Any, params: Any, progress: Any) -> list[RequestOutput]:
            bad = Answer(
                text="", token_ids=[], logprobs=None, finish_reason="error", stop_reason=None, error="no pixels"
            )
            good = replace(bad, text=" red", finish_reason="stop", error=None)
            return [RequestOutput(prompt_token_ids=[1], outputs=[bad if i < failed else good]) for i in range(of)]

        monkeypatch.setattr(replicas, "generate", generate)
        text = SimpleNamespace(tokens=[1], plans=(), positions=None)
        monkeypatch.setattr(vqa, "encode_prompt", lambda *args: text)
        model: Any = SimpleNamespace(ranks=None, tokenizer=None, template=None, spec=None)
        answers = vqa.answer_all([question("colour", "red")] * of, model, 4)
        assert answers == [""] * failed + ["red"] * (of - failed)

    answered(1, 100)
    assert "1 of 100 questions have no answer, the first because of: no pixels; they count as wrong" in caplog.text
    with pytest.raises(UserError, match="2 of 100 questions have no answer"):
        answered(2, 100)
