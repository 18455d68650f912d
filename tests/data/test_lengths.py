"""Lengths beside a shard: exactly what encoding gives, under a name that changes when an id could."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.data.raw_data import SPEC, data_config, write_all_lengths
from vlm_nemo.data.chat import TEMPLATES, encode_conversation
from vlm_nemo.data.config import LayoutConfig, SourceConfig
from vlm_nemo.data.layout.images import count_tokens, vision_cost
from vlm_nemo.data.layout.plan import plain
from vlm_nemo.data.layout.spec import image_spec
from vlm_nemo.data.lengths import fingerprint, lengths_path, measure, reason_of, write_lengths
from vlm_nemo.data.loader import LOOKED_AT, Loader
from vlm_nemo.data.mixture import build_mixture
from vlm_nemo.data.sample import BAD_JSON, IMAGE_WITHOUT_MARKER, NO_LABEL, REASONS, Record, SampleError
from vlm_nemo.data.storage.shards import ShardFolder
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.types import UserError

SHORT = TEMPLATES["short"]


def test_a_length_is_what_encoding_gives_without_the_placeholders(prepared: Path, tokenizer: Tokenizer) -> None:
    folder = ShardFolder(prepared / "instruct")
    records = [folder.record(i) for i in range(len(folder))]
    found = measure(records, tokenizer, SHORT, LayoutConfig())
    assert found.dtype == np.int32 and {len(r.sizes) for r in records} == {0, 1, 2}
    for n, record in zip(found.tolist(), records, strict=True):
        for each in (0, 7):
            text = encode_conversation(record.messages, tokenizer, SHORT, [plain(each)] * len(record.sizes))
            assert len(text.tokens) == n + each * len(record.sizes)


def test_what_cannot_be_used_is_a_reason(tokenizer: Tokenizer) -> None:
    def record(answer: str, sizes: list[tuple[int, int]]) -> Record:
        messages = [{"role": "user", "content": "hue?"}, {"role": "assistant", "content": answer}]
        return Record(messages=messages, kind=None, source_id="", sizes=sizes)  # type: ignore[arg-type]

    records = [record("red", []), record(" ", []), record("red", [(9, 9)]), SampleError(BAD_JSON, "x")]
    found = measure(records, tokenizer, SHORT, LayoutConfig())
    assert found[0] > 0
    assert [reason_of(int(n)) for n in found[1:]] == [NO_LABEL, IMAGE_WITHOUT_MARKER, BAD_JSON]
    with pytest.raises(UserError, match="no reason of this version"):
        reason_of(-len(REASONS) - 1)


def test_the_fingerprint_follows_the_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    name = fingerprint(tokenizer, SHORT, LayoutConfig())
    assert len(name) == 12 and int(name, 16) >= 0
    assert fingerprint(Tokenizer(shutil.copytree(tokenizer.folder, tmp_path / "same")), SHORT, LayoutConfig()) == name
    assert fingerprint(tokenizer, replace(SHORT, user_end=" "), LayoutConfig()) != name
    other = shutil.copytree(tokenizer.folder, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert fingerprint(Tokenizer(other), SHORT, LayoutConfig()) != name
    swapped = shutil.copytree(tokenizer.folder, tmp_path / "swapped")
    config = json.loads((swapped / "tokenizer_config.json").read_text())
    config["bos_token"], config["eos_token"] = config["eos_token"], config["bos_token"]
    (swapped / "tokenizer_config.json").write_text(json.dumps(config))
    assert fingerprint(Tokenizer(swapped), SHORT, LayoutConfig()) != name


def test_a_sidecar_is_written_whole(tmp_path: Path) -> None:
    path = lengths_path(tmp_path / "00007.tar", "0123456789ab")
    assert path.name == "00007.tar.lengths-0123456789ab.safetensors"
    write_lengths(path, np.array([5, -2, 9], dtype=np.int32))
    assert load_file(path)["text_tokens"].tolist() == [5, -2, 9]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_vision_cost_is_the_patches_that_are_computed() -> None:
    assert vision_cost(image_spec(LayoutConfig(), size=336, patch=14), [(640, 480)]) == 576
    assert vision_cost(image_spec(LayoutConfig(aspect="crop"), size=64, patch=16, class_token=True), [(40, 30)]) == 16
    assert vision_cost(image_spec(LayoutConfig(), size=64, patch=16, reduce="merge", factor=2), [(40, 30)]) == 16


def test_a_loader_tells_the_first_lengths_of_its_order(prepared: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    cfg = data_config(copy)

    def lengths(rank: int) -> tuple[list[int], int | None]:
        given: dict[str, Any] = {"seed": 5, "max_tokens": 30, "dp_rank": rank, "dp_size": 2}
        with closing(Loader(cfg, SPEC, tokenizer, **given)) as loader:
            return loader.first_lengths, loader.cycle

    assert lengths(0) == ([], None), "nothing was measured"
    write_all_lengths(copy)
    cfg.sources = {
        "captions": SourceConfig(path=str(copy / "captions"), epochs=1),
        "instruct": SourceConfig(path=str(copy / "instruct"), samples=40),
    }
    assert lengths(1) == ([], 100)
    found, cycle = lengths(0)
    assert cycle == 100 and len(found) == LOOKED_AT
    folders = {name: ShardFolder(copy / name) for name in cfg.sources}
    mixture = build_mixture(cfg.sources, {name: len(folder) for name, folder in folders.items()}, seed=5, shuffle=True)
    for position in range(100):
        source, _, number = mixture[position]
        record = folders[source].record(number)
        images = [plain(count_tokens(SPEC, [size])) for size in record.sizes]
        length = len(encode_conversation(record.messages, tokenizer, TEMPLATES["short"], images).tokens)
        assert found[position] == (length if length <= 30 else 0)
    assert 0 in found[:100]
