"""What perturbing finds: nothing in sound models of every kind, and each fault that is planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from tests.check.conftest import ALL
from vlm_nemo.check.labels import Spoken, label_faults
from vlm_nemo.check.made import Subject, conversations, subject
from vlm_nemo.check.probe import probe
from vlm_nemo.config import Config, build, compose
from vlm_nemo.data import packing
from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.sample import EncodedSample
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.model import attention, batch, views, vision_layer
from vlm_nemo.model.twin import twin
from vlm_nemo.types import IGNORE_INDEX, PackedBatch

MODELS = [
    "llava15_7b",
    "llava_next_mistral_7b",
    "llava_onevision_0.5b",
    "internvl25_1b",
    "qwen2_5_vl_3b",
    "gemma3_4b",
    "idefics3_8b",
    "ovis2_1b",
    "blip2_vicuna_7b",
    "llama32_vision_11b",
]
"""One of every layout, reduction and projector."""


def broken(subject: Subject) -> list[str]:
    return [one.what for one in probe(subject) if not one.ok]


@pytest.mark.parametrize("name", MODELS)
def test_a_sound_model_keeps_samples_apart(name: str, tmp_path: Path) -> None:
    cfg = build(compose("train", Config, [f"model={name}"]), Config).model
    found = probe(subject(twin(cfg), ALL, "vicuna", tmp_path))
    assert [one for one in found if not one.ok] == []
    assert len(found) > 10


def test_a_causal_tower_is_found(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = views._whole
    monkeypatch.setattr(vision_layer, "AttnMaskType", SimpleNamespace(no_mask=AttnMaskType.causal))
    monkeypatch.setattr(views, "_whole", lambda lengths: replace(whole(lengths), causal=True))
    assert broken(small) == ["the last patch of a view -> the feature of its first"]


def test_a_leaking_mask_is_found(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    real = batch.make_segments

    def whole(cu: torch.Tensor, used: int, **given: Any) -> Any:
        return real(cu[[0, -1]], int(cu[-1]), **given)

    monkeypatch.setattr(batch, "make_segments", whole)
    found = broken(small)
    assert "other words in a sample -> logits of other samples" in found
    assert "another image -> logits of other samples" in found
    assert "samples in the other order -> logits" in found


def test_a_decoder_that_sees_ahead_is_found(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention.segment_attention

    def ahead(q: Any, k: Any, v: Any, segments: Any, *more: Any) -> Any:
        return real(q, k, v, replace(segments, causal=False), *more)

    monkeypatch.setattr(attention, "segment_attention", ahead)
    assert "other words -> logits before them" in broken(small)


def planted(monkeypatch: pytest.MonkeyPatch, change: Callable[[PackedBatch], PackedBatch]) -> None:
    """pack_batch with `change` after it, wherever it is used."""
    from vlm_nemo.check import labels, made
    from vlm_nemo.check import probe as probes

    def faulty(*given: Any, **named: Any) -> PackedBatch:
        return change(packing.pack_batch(*given, **named))

    for module in (labels, made, probes):
        monkeypatch.setattr(module, "pack_batch", faulty)


def test_positions_that_run_on_are_found(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions are relative: no logit says so."""
    planted(monkeypatch, lambda row: replace(row, positions=torch.arange(len(row.tokens)).expand(3, -1)))
    assert broken(small) == ["positions in a row"]


def spoken(small: Subject) -> list[Spoken]:
    made = zip(conversations(small.model.vision.image_size), small.samples(), strict=True)
    return [Spoken(one.messages, sample, f"sample {i}") for i, (one, sample) in enumerate(made)]


def faults_of(small: Subject, samples: list[Spoken]) -> list[str]:
    return label_faults(samples, Tokenizer(small.tokenizer), TEMPLATES[small.template])


@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_are_the_answers_with_every_template(template: str, small: Subject, tmp_path: Path) -> None:
    other = subject(small.model, ALL, template, tmp_path)
    assert faults_of(other, spoken(other)) == []


@pytest.mark.parametrize("by", [-1, 1], ids=["not shifted", "shifted twice"])
def test_a_wrong_label_shift_is_found(by: int, small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, lambda row: replace(row, labels=row.labels.roll(-by)))
    found = faults_of(small, spoken(small))
    assert len(found) >= 8 and "the token behind it" in found[0]


def changed(one: Spoken, labels: list[int]) -> Spoken:
    sample = one.sample
    return one._replace(sample=EncodedSample(tokens=sample.tokens, labels=labels, images=sample.images))


def test_a_supervised_prompt_is_found(small: Subject) -> None:
    one = spoken(small)[1]
    prompt = one.sample.labels.index(next(x for x in one.sample.labels if x != IGNORE_INDEX))
    labels = [*one.sample.labels[: prompt - 4], *one.sample.tokens[prompt - 4 :]]
    assert "answer 1 is supervised as" in faults_of(small, [changed(one, labels)])[0]


def test_a_supervised_placeholder_is_found(small: Subject) -> None:
    one = spoken(small)[0]
    assert "is the special token" in faults_of(small, [changed(one, list(one.sample.tokens))])[0]


def test_a_missing_answer_is_found(small: Subject) -> None:
    one = spoken(small)[2]
    first = next(i for i, x in enumerate(one.sample.labels) if x == Tokenizer(small.tokenizer).eos_id)
    labels = [IGNORE_INDEX] * (first + 1) + list(one.sample.labels[first + 1 :])
    assert faults_of(small, [changed(one, labels)]) == ["sample 2: 1 answers are supervised, it has 2"]
