"""`vlm-nemo generate`: the answer alone on stdout, and a word on stderr where there is none."""

from __future__ import annotations

from collections import defaultdict

import pytest

from tests.infer.fakes import SPEC, ScriptBackend, make_tokenizer
from vlm_nemo import cli
from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.infer.engine import Engine
from vlm_nemo.infer.load import LoadedModel
from vlm_nemo.verbs import generate


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("text", "out", "err"),
    [
        ("a red circle", "a red circle\n", ""),
        ("", "\n", "the model answered nothing: its first token ended the text\n"),
        (" ", "\n", "the model answered nothing that can be read: 2 tokens, blank or special ones only\n"),
    ],
)
def test_an_answer_of_nothing_is_said_to_be_one(
    text: str,
    out: str,
    err: str,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = [*tokenizer.encode(text), tokenizer.eos_id]
    backend = ScriptBackend(tokenizer.vocab_size, defaultdict(lambda: answer))
    model = LoadedModel(
        name="made",
        tokenizer=tokenizer,
        template=TEMPLATES["vicuna"],
        spec=SPEC,
        engine=Engine(backend, tokenizer),
        info={},
    )
    monkeypatch.setattr(generate, "open_model", lambda **_: model)
    assert cli.main(["generate", "hf=made", "prompt=what is this?"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (out, err)
