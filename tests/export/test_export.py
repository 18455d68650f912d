"""What an export says against transformers, and what makes an export fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest

from tests.export.twin import CAPACITY, TransformersReference, export, files, prompts
from tests.weights import twins
from vlm_nemo import cli
from vlm_nemo.data.chat import TEMPLATES
from vlm_nemo.data.tokenizer import Tokenizer
from vlm_nemo.export import language_graph, parity, reference
from vlm_nemo.infer.bundle import open_bundle
from vlm_nemo.infer.onnx_backend import OnnxBackend

VARIANTS: dict[str, dict[str, Any]] = {
    "llava": {},
    "tied": {"text": {"tie_word_embeddings": True}, "tie_word_embeddings": True},
    "class token kept, last layer": {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    "gelu, every head its own keys": {"vision": {"hidden_act": "gelu"}, "text": {"num_key_value_heads": 4}},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_fp32_equals_transformers_stepwise_and_ragged(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = TransformersReference(twins.llava(tmp_path / "hf", **changes))
    export(f"hf={tmp_path / 'hf'}", f"out={tmp_path / 'out'}", "precision=fp32", f"capacity={CAPACITY}")
    bundle = open_bundle(tmp_path / "out")
    cases = parity.make_cases(theirs, bundle, 300, CAPACITY)
    assert [len(case.images) for case in cases] == [0, 1, 2]
    assert len({case.prompt for case in cases}) == 3
    found = parity.measure(OnnxBackend(bundle, slots=3), theirs, cases, "fp32")
    assert set(found) == {"vision", "stepwise", "ragged"}
    for part in found.values():
        assert part.limit == 1e-4 and part.ok, part
    assert found["ragged"].argmax_equal == 1.0


def test_fp16_runs_within_its_limit(llava_twin: tuple[Path, Any], tmp_path: Path) -> None:
    export(f"hf={llava_twin[0]}", f"out={tmp_path / 'out'}", "precision=fp16", f"capacity={CAPACITY}")
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["ran"] == "fp16" and report["ok"]
    for part in report["parts"].values():
        assert 1e-5 < part["max_error"] < part["limit"] < 0.05


def test_bf16_graphs_run_in_onnx_s_own_evaluator(llava_twin: tuple[Path, Any], tmp_path: Path) -> None:
    """ONNX Runtime has no bf16 on a CPU; the reference evaluator does, at a speed for tiny models."""
    import ml_dtypes

    out = tmp_path / "out"
    export(f"hf={llava_twin[0]}", f"out={out}", "precision=bf16", f"capacity={CAPACITY}")
    bundle = open_bundle(out)
    (tokens, images), theirs = prompts()[1], TransformersReference(llava_twin[1])
    assert images is not None
    vision, language = (
        onnx.reference.ReferenceEvaluator(onnx.load(path)) for path in (bundle.vision_graph, bundle.language_graph)
    )
    (seen,) = vision.run(None, {"pixels": images})
    assert np.abs(np.asarray(seen, dtype=np.float32) - theirs.image_embeds(images)).max() < 0.05
    embeds = bundle.embedding()[tokens].view(ml_dtypes.bfloat16)
    embeds[tokens == bundle.image_token] = np.asarray(seen).reshape(-1, bundle.hidden_size)
    feeds = {
        "inputs_embeds": embeds[None],
        "position_ids": np.arange(len(tokens))[None],
        "write_indices": np.zeros(1, dtype=np.int64),
        "last_index": np.array([len(tokens) - 1]),
    }
    for i in range(bundle.layers):
        for kind in ("key", "value"):
            feeds[f"past_{kind}_{i}"] = np.zeros(bundle.cache_shape(1), dtype=ml_dtypes.bfloat16)
    logits = language.run(["logits"], feeds)[0]
    expected = theirs.logits(tokens, images)[-1]
    assert logits.dtype == np.float32
    assert np.abs(logits[0] - expected).max() < 0.02 * max(1.0, np.abs(expected).max())


def test_an_export_holds_what_its_manifest_says(exported: Path) -> None:
    bundle = open_bundle(exported, skip=())
    assert files(exported) == {*bundle.manifest["files"], "manifest.json"}
    assert {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "embedding.safetensors",
        "vision/model.onnx",
        "vision/model.onnx.data",
        "llm/model.onnx",
        "llm/model.onnx.data",
        "golden/case_2.npz",
        "parity.json",
    } <= files(exported)
    assert Tokenizer(exported).image_id == bundle.image_token
    assert bundle.template in TEMPLATES
    llm = bundle.manifest["io"]["llm"]
    assert llm["inputs"][0] == {"name": "inputs_embeds", "type": "float", "shape": ["B", "S", 32]}
    assert llm["inputs"][-1] == {"name": "past_value_1", "type": "float", "shape": ["B", 2, CAPACITY, 8]}
    assert llm["outputs"][-1] == {"name": "logits", "type": "float", "shape": ["B", 320]}
    assert bundle.manifest["io"]["vision"]["inputs"][0]["type"] == "uint8"
    with np.load(exported / "golden" / "case_1.npz") as case:
        got = OnnxBackend(bundle).embed_images(case["images"])
        assert got.shape == (1, 4, 32) and len(case["tokens"]) == case["prompt"] + len(case["logits"]) - 1


def test_a_checkpoint_exports_like_the_folder_it_came_from(
    llava_twin: tuple[Path, Any], exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", f"hf={llava_twin[0]}", f"out={tmp_path / 'ours'}"]) == 0
    capsys.readouterr()
    words = ("precision=fp32", "slots=4", f"capacity={CAPACITY}")
    export(f"checkpoint={tmp_path / 'ours'}", f"out={tmp_path / 'out'}", *words)
    said = capsys.readouterr().out
    for line in ("writing 0", "parity stepwise: largest error", "likeliest token equal in 100.0%", "wrote "):
        assert line in said
    for name in ("vision/model.onnx.data", "llm/model.onnx.data", "llm/model.onnx", "embedding.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (exported / name).read_bytes(), name


def late_angles(tables: Any) -> Any:
    """Rotary angles one position late: between tokens nothing changes, to the first one, which wraps, it does."""
    return lambda *given: tuple(np.roll(table, 1, axis=0) for table in tables(*given))


@pytest.mark.parametrize("fault", ["graph", "image order"])
def test_a_wrong_export_fails_the_command(
    llava_twin: tuple[Path, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    if fault == "graph":
        monkeypatch.setattr(language_graph, "rope_tables", late_angles(language_graph.rope_tables))
    else:
        logits = reference.TorchReference.logits
        monkeypatch.setattr(reference.TorchReference, "logits", lambda self, t, i: logits(self, t, i[::-1].copy()))
    out = tmp_path / "out"
    export(f"hf={llava_twin[0]}", f"out={out}", "precision=fp32", f"capacity={CAPACITY}", code=2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: parity failed: stepwise, step ") and "the limit is 0.0001" in line
    assert not out.exists() and files(tmp_path) == {"out.parity.json"}
    assert json.loads((tmp_path / "out.parity.json").read_text())["ok"] is False


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["hf={hf}", "checkpoint=x"], "name the model, as one of checkpoint=DIR, hf=DIR"),
        ([], "name the model, as one of checkpoint=DIR, hf=DIR"),
        (["hf={hf}", "capacity=4096"], "capacity=4096 between 2 and 2048"),
        (["hf={hf}", "slots=0"], "slots=0 must be at least 1"),
        (["hf={hf}", "capacity=3"], "leaves no room for a prompt and an answer"),
        (["hf={hf}", "engine=tensorrt"], "engine=tensorrt: the package tensorrt does not import"),
        (["hf={hf}", "engine_sm=[89]"], "engine=none compiles nothing"),
        (["hf={hf}", "precision=int8"], "precision must be one of auto, fp32, bf16, fp16"),
        (
            ["hf={hf}", "template=vicunna"],
            f"template must be one of {', '.join(('auto', *TEMPLATES))}, not 'vicunna'; did you mean vicuna?",
        ),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line(
    llava_twin: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    export(*(word.format(hf=llava_twin[0]) for word in words), f"out={tmp_path / 'out'}", code=2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and says in line
    assert files(tmp_path) == set()


def test_weights_that_fp16_cannot_hold_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    twins.llava(tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    name = next(n for n in state if n.endswith("layers.0.mlp.down_proj.weight"))
    state[name][0, 0] = 1e6
    save_file(state, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    export(f"hf={tmp_path / 'hf'}", f"out={tmp_path / 'out'}", "precision=fp16", "capacity=32", code=2)
    assert "down_proj.weight exceeds what fp16 can hold; export with precision=bf16" in capsys.readouterr().err
