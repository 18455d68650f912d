"""Writes docs/families.md: what each family is made of, and how far it is from transformers' class.

python docs/families.py             the table from conf/model and the families; parity as it was last measured
python docs/families.py --measure   measure parity too: tiny random models, two conversations, fp32 (a minute)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from vlm_nemo.config import Config, build, compose
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.parts import group_choices
from vlm_nemo.weights.card import NAMES
from vlm_nemo.weights.configs.common import view_tokens
from vlm_nemo.weights.configs.languages import fitting_language
from vlm_nemo.weights.configs.towers import fitting_tower
from vlm_nemo.weights.families import FAMILIES

PAGE, MEASURED = Path(__file__).parent / "families.md", Path(__file__).parent / "families.json"

HEAD = """\
# Families

Every row is `conf/model/<name>.yaml`: `vlm-nemo train model=<name> …`; `vlm-nemo convert` reads and writes the class of
Hugging Face's. Made by `python docs/families.py`.

Parity: the largest difference of logits from transformers' class (fp32, tiny random weights of the same structure,
conversations without, with one and with two images of odd sizes; tests/families/test_parity.py holds it below 1e-4,
packed, on two tensor ranks and on two pipeline stages too).

| model | parts | tokens an image | positions | class | parity |
|---|---|---|---|---|---|
"""


def page() -> str:
    """The whole file."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}
    names = [name for name in group_choices("model") if name != "tiny"]
    return HEAD + "".join(_row(name, measured) for name in names)


def _row(name: str, measured: dict[str, float]) -> str:
    cfg = build(compose("train", Config, [f"model={name}"]), Config).model
    family = FAMILIES[cfg.family]
    tower = NAMES[fitting_tower(cfg.vision, family.towers)[0]].removesuffix("'s")
    decoder = NAMES[fitting_language(cfg.language, family.languages)[0]].removesuffix("'s")
    v, lang = cfg.vision, cfg.language
    parts = (
        f"{tower} {v.num_layers} x {v.hidden_size}; {_between(cfg)}; {decoder} {lang.num_layers} x {lang.hidden_size}"
    )
    reached = f"{measured[name]:.0e}" if name in measured else ""
    return f"| {name} | {parts} | {_tokens(cfg)} | {_positions(cfg)} | {family.architecture} | {reached} |\n"


def _between(cfg: ModelConfig) -> str:
    p, r = cfg.projector, cfg.reduce
    kind = {
        "mlp": "linear" if p.num_layers == 1 else f"{p.num_layers}-layer MLP",
        "qformer": f"Q-Former of {p.num_queries} queries",
        "visual_vocabulary": f"{p.vocabulary:,} visual words",
        "cross_attention": "cross-attention",
        "perceiver": f"Perceiver of {p.num_queries} queries",
    }[p.kind]
    return kind if r.kind == "none" else f"{r.kind.replace('_', ' ')} {r.factor} x {r.factor}, {kind}"


def _tokens(cfg: ModelConfig) -> str:
    layout, view = cfg.layout, view_tokens(cfg)
    side = cfg.vision.image_size
    return {
        "square": f"{view}",
        "anyres": f"{view} + rows x columns + rows of the unpadded tiles",
        "tiles": f"{view} x (tiles + 1 if tiles > 1) + 2, tiles up to {layout.max_tiles}",
        "canvas": "1 (looked at by cross-attention)",
        "ovis": f"{view} x (1 + tiles if tiles > 1) + indicators, tiles up to {layout.max_tiles}",
        "rows": f"{view} x (tiles + 1) + their names, tiles of {side} up to {layout.longest_edge} pixels",
        "native": f"height x width / {cfg.vision.patch_size * cfg.reduce.factor}^2 + 2",
    }[layout.kind]


def _positions(cfg: ModelConfig) -> str:
    lang = cfg.language
    words = f"M-RoPE {lang.mrope_section}" if lang.mrope_section else "1-D"
    if lang.rope_scaling.kind != "none":
        words += f", {lang.rope_scaling.kind} x {lang.rope_scaling.factor:g}"
    if lang.image_attention == "bidirectional":
        words += ", images see themselves whole"
    return words


def measure() -> None:
    """Write families.json."""
    import torch

    from tests.families.pairs import copy_weights, hf_logits, sample, sizes_of
    from tests.families.test_parity import packed
    from tests.weights import zoo
    from tests.weights.published import published
    from vlm_nemo.model.build import build_model
    from vlm_nemo.model.twin import twin
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.runtime.config import ParallelConfig

    found = {}
    with device.adapter(), torch.no_grad():
        groups.start(ParallelConfig(), seed=0)
        for name in [name for name in group_choices("model") if name != "tiny"]:
            cfg = twin(published(name))
            words = zoo.write_words(Path(tempfile.mkdtemp()), cfg.family)
            theirs = zoo.random_model(cfg, words)
            chunks = build_model(cfg, ParallelConfig(), "fp32", 0)
            copy_weights(theirs, chunks, cfg)
            largest = 0.0
            for sizes in sizes_of(cfg).values():
                one = sample(cfg, words, sizes)
                ours = chunks[0].eval()(packed(cfg, words, [one]), gather_logits=True)[0]
                largest = max(largest, float((ours - hf_logits(theirs, cfg, one, sizes, words.image_id)).abs().max()))
            found[name] = largest
        groups.stop()
    MEASURED.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "--measure" in sys.argv[1:]:
        measure()
    PAGE.write_text(page(), encoding="utf-8")
