"""Training starts from what was converted, and what it does not use stays with the model."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from tests import runs
from tests.weights import twins
from tests.weights.test_parts import save_clip
from tests.weights.test_round_trip import convert, state
from vlm_nemo.train import checkpoint, tensors

MODEL = [
    "model.vision.image_size=16",
    "model.vision.patch_size=8",
    "model.vision.hidden_size=16",
    "model.vision.num_layers=3",
    "model.vision.num_heads=4",
    "model.vision.ffn_hidden_size=32",
    "model.vision.activation=quick_gelu",
    "model.vision.feature_layer=-2",
    "model.language.hidden_size=32",
    "model.language.num_layers=2",
    "model.language.num_heads=4",
    "model.language.num_kv_heads=2",
    "model.language.ffn_hidden_size=48",
    "model.language.rope_base=5000",
    "model.language.norm_eps=1e-6",
    "data.pack.capacity=256",
    "data.global_packs=2",
    "trainer.steps=2",
    "checkpoint.every=1",
    "checkpoint.keep=1",
]


def save_llama(folder: Path, tokenizer: Path) -> int:
    """A Llama whose tokenizer has <image> and <pad> already; its rows."""
    torch.manual_seed(0)
    folder.mkdir()
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    rows = 512
    twins.shaken(transformers.LlamaForCausalLM(twins.llama_config(rows))).save_pretrained(folder)
    return rows


def test_a_tower_and_a_decoder_are_trained_with_a_fresh_projector(tmp_path: Path, shards: Path) -> None:
    save_clip(tmp_path / "clip", "CLIPModel")
    rows = save_llama(tmp_path / "llama", shards / "tokenizer")
    convert(f"hf=[{tmp_path}/clip,{tmp_path}/llama]", f"out={tmp_path}/start")
    words = [
        "recipe=shapes/stage1",
        *MODEL,
        *runs.data_words(shards),
        f"model.language.vocab_size={rows}",
        f"data.tokenizer={tmp_path}/start/tokenizer",
        f"checkpoint={tmp_path}/start",
        f"run_dir={tmp_path}/run",
    ]
    lacking = runs.vlm_nemo("train", *words, "checkpoint.reset=[]", code=2).stderr
    assert "start has no projector: train it from a fresh start with checkpoint.reset=[projector]" in lacking
    # Stage 1's recipe resets it. Stopped and gone on with: the idle tensors pass from checkpoint to checkpoint
    runs.vlm_nemo("train", *words, "trainer.stop_at=1")
    runs.vlm_nemo("train", *words)
    trained = checkpoint.find(tmp_path / "run")
    assert (trained.name, checkpoint.verify(trained)) == ("step_000002", [])
    for part in ("vision", "language"):  # frozen: the same files, whatever became of the checkpoint between
        (file,) = (tmp_path / "start" / "weights").glob(f"{part}_*")
        assert file.samefile(trained / "weights" / file.name) and file.stat().st_nlink == 2
    before, after = (dict(_unused(folder)) for folder in (tmp_path / "start", trained))
    assert len(before) == 16 + 2 and before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    convert(f"checkpoint={trained}", f"out={tmp_path}/hf")
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # Frozen parts are the ones that came
    frozen = {f"vision_tower.{k}": v for k, v in state(tmp_path / "clip").items() if k.startswith("vision_model.")}
    frozen |= {f"language_model.{k}": v for k, v in state(tmp_path / "llama").items()}
    written = state(tmp_path / "hf")
    assert all(torch.equal(tensor, written[name]) for name, tensor in frozen.items())
    assert set(written) - set(frozen) == {
        f"multi_modal_projector.linear_{n}.{end}" for n in (1, 2) for end in ("weight", "bias")
    }


def test_a_part_that_starts_afresh_leaves_its_idle_tensors_behind(tmp_path: Path) -> None:
    twins.llava(tmp_path / "five")
    twins.respell(tmp_path / "five", tmp_path / "hub")
    convert(f"hf={tmp_path}/hub", f"out={tmp_path}/ours")
    parts = [key.split(".")[0] for key, _ in _unused(tmp_path / "ours")]
    assert (parts.count("vision"), parts.count("language")) == (16 + 3, 1)
    left = tensors.read_unused(tmp_path / "ours" / "weights", skip_parts=["vision"])
    assert [chunk.key.split(".")[0] for chunk, _ in left] == ["language"]


def _unused(step_folder: Path) -> list[tuple[str, torch.Tensor]]:
    return [(chunk.key, tensor) for chunk, tensor in tensors.read_unused(step_folder / "weights")]
