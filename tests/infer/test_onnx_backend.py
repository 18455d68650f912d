"""An export in ONNX Runtime says what transformers says, whatever shares the cache, and without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.export.twin import CAPACITY, TransformersReference, prompts
from tests.squares import squares
from vlm_nemo.infer.backend import Row
from vlm_nemo.infer.bundle import open_bundle
from vlm_nemo.infer.onnx_backend import OnnxBackend
from vlm_nemo.types import UserError

STEPS = 10

ANSWER = """
import importlib.abc, json, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "megatron", "transformers", "onnx"):
            raise ImportError(f"{name} is blocked in this process")

sys.meta_path.insert(0, Blocked())
import numpy as np
from tests.squares import squares
from vlm_nemo.infer.backend import Row
from vlm_nemo.infer.bundle import open_bundle
from vlm_nemo.infer.onnx_backend import OnnxBackend

backend = OnnxBackend(open_bundle(sys.argv[1]))
given = np.load(sys.argv[2])
rows, answers = [], []
for slot in range(3):
    images = given[f"images{slot}"]
    tokens = given[f"tokens{slot}"].tolist()
    rows.append(Row(slot=slot, start=0, tokens=tokens, images=squares(images, tokens) if len(images) else None))
    answers.append([])
for step in range(int(sys.argv[3])):
    chosen = backend.run(rows).argmax(-1).tolist()
    for answer, token in zip(answers, chosen):
        answer.append(token)
    rows = [Row(slot=r.slot, start=r.start + len(r.tokens), tokens=[t]) for r, t in zip(rows, chosen)]
assert not {"torch", "megatron"} & set(sys.modules)
print(json.dumps(answers))
"""


def test_greedy_ids_equal_generates_where_torch_cannot_be_imported(
    exported: Path, llava_twin: tuple[Path, Any], tmp_path: Path
) -> None:
    reference = TransformersReference(llava_twin[1])
    asked = prompts()
    expected = [reference.greedy(tokens, images, STEPS) for tokens, images in asked]
    none = np.zeros((0, 3, 16, 16), dtype=np.uint8)
    given = {f"tokens{i}": tokens for i, (tokens, _) in enumerate(asked)}
    given |= {f"images{i}": none if images is None else images for i, (_, images) in enumerate(asked)}
    np.savez(tmp_path / "given.npz", **given)
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(exported), str(tmp_path / "given.npz"), str(STEPS)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_a_sequence_does_not_see_its_mates_nor_who_had_its_slot(exported: Path) -> None:
    alone, crowded = OnnxBackend(open_bundle(exported)), OnnxBackend(open_bundle(exported))
    (tokens, images), others = prompts()[1], prompts(seed=1)
    # The slots have had other, longer tenants
    for slot in range(4):
        filler = np.full(CAPACITY, 5 + slot).tolist()
        crowded.run([Row(slot=slot, start=0, tokens=filler)])
    a = alone.run([Row(slot=0, start=0, tokens=tokens.tolist(), images=squares(images, tokens))])[0]
    # A mate that lives between the two slots that decode, and is not named while they do
    mate = Row(slot=1, start=0, tokens=others[0][0].tolist())
    b = crowded.run([mate, Row(slot=2, start=0, tokens=tokens.tolist(), images=squares(images, tokens))])[1]
    assert np.abs(a - b).max() < 1e-5
    crowded.run([Row(slot=0, start=0, tokens=others[2][0].tolist(), images=squares(others[2][1], others[2][0]))])
    for step, token in enumerate((7, 9, 11)):
        start = len(tokens) + step
        a = alone.run([Row(slot=0, start=start, tokens=[token])])[0]
        rows = [Row(slot=2, start=start, tokens=[token]), Row(slot=0, start=19 + step, tokens=[4])]
        b = crowded.run(rows)[0]
        assert np.abs(a - b).max() < 1e-5
    lonely = OnnxBackend(open_bundle(exported))
    lonely.run([Row(slot=0, start=0, tokens=mate.tokens)])
    expected = lonely.run([Row(slot=0, start=7, tokens=[8])])[0]
    assert np.abs(crowded.run([Row(slot=1, start=7, tokens=[8])])[0] - expected).max() < 1e-5


def test_a_prompt_may_come_in_pieces_and_fill_the_cache(exported: Path, llava_twin: tuple[Path, Any]) -> None:
    tokens = np.random.default_rng(2).integers(4, 300, CAPACITY)
    expected = TransformersReference(llava_twin[1]).logits(tokens, None)
    backend = OnnxBackend(open_bundle(exported), slots=1)
    backend.run([Row(slot=0, start=0, tokens=tokens[:20].tolist())])
    got = backend.run([Row(slot=0, start=20, tokens=tokens[20:-1].tolist())])
    assert np.abs(got[0] - expected[-2]).max() < 1e-4
    got = backend.run([Row(slot=0, start=CAPACITY - 1, tokens=tokens[-1:].tolist())])
    assert np.abs(got[0] - expected[-1]).max() < 1e-4


def test_what_does_not_fit_is_refused_before_the_cache_is_touched(exported: Path) -> None:
    backend = OnnxBackend(open_bundle(exported))
    images = np.zeros((2, 3, 16, 16), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"4 image placeholders but 2 images of 4 embeddings \(8\)"):
        backend.run([Row(slot=0, start=0, tokens=[3, 3, 3, 3, 9], images=squares(images))])
    with pytest.raises(ValueError, match="1 tokens behind 48 of 48"):
        backend.run([Row(slot=0, start=CAPACITY, tokens=[5])])
    with pytest.raises(ValueError, match="slot 4 of 4"):
        backend.run([Row(slot=4, start=0, tokens=[5])])
    with pytest.raises(ValueError, match="share a slot"):
        backend.run([Row(slot=1, start=0, tokens=[5]), Row(slot=1, start=0, tokens=[6])])


def test_a_damaged_export_is_named(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an export"):
        open_bundle(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    with (copy / "llm" / "model.onnx.data").open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    with pytest.raises(UserError, match=r"is damaged: llm/model\.onnx\.data; export again"):
        open_bundle(copy)
    (copy / "manifest.json").write_text('{"format": "vlm_nemo export 2"}')
    with pytest.raises(UserError, match=r"manifest\.json is damaged: KeyError"):
        open_bundle(copy)


def test_what_this_runtime_cannot_do_is_said(exported: Path, tmp_path: Path) -> None:
    bundle = open_bundle(exported)
    with pytest.raises(UserError, match="choose cpu or cuda"):
        OnnxBackend(bundle, device="tpu")
    with pytest.raises(UserError, match="onnxruntime-gpu"):
        OnnxBackend(bundle, device="cuda")
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["precision"] = "bf16"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no CPU kernels; export with precision=fp32"):
        OnnxBackend(open_bundle(copy))
