"""Every reduction and projector against transformers' modules with the same random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
from transformers.models.ovis2.modeling_ovis2 import Ovis2VisionModel, Ovis2VisualEmbeddingTable
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

from tests.model import parts, pieces
from vlm_nemo.model.projector.base import Projector
from vlm_nemo.model.projector.build import build_projector
from vlm_nemo.model.projector.vocabulary import VisualVocabulary
from vlm_nemo.model.views import Grid
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.types import UserError
from vlm_nemo.weights.names.projectors import PROJECTORS as NAMES
from vlm_nemo.weights.names.rows import Entry
from vlm_nemo.weights.transforms import IDENTITY, KV, Sizes

Run = Callable[[Tensor], Tensor]
"""Features of one view [P, 12] -> [E, 16]."""
VISION = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 8}
TEXT = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}


@pytest.fixture(autouse=True)
def alone(one_process: None) -> Iterator[None]:
    with torch.no_grad():
        yield


def randomised(module: nn.Module) -> Any:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.eval()


def ours(name: str, table: str, state: dict[str, Tensor]) -> Projector:
    """Our projector with these weights, by the names that `convert` uses."""
    cfg = parts.PROJECTORS[name]
    own = cfg.projector
    projector = build_projector(cfg, ParallelConfig(), torch.float32)
    layers = own.num_layers if own.kind == "qformer" else 0
    sizes = Sizes(heads=own.num_heads, kv_heads=own.num_heads)
    pieces.load(projector, "projector", state, NAMES[table].entries("projector", own, layers, sizes))
    return projector.eval()


def compare(projector: Projector, run: Run, grids: list[Grid], tolerance: float = 1e-5) -> None:
    """Views of these grids together, against transformers' module on each alone."""
    features = parts.random_features(grids)
    out = projector(features, grids)
    expected = torch.cat([run(x) for x in features.split([h * w for h, w in grids])])
    assert out.shape == expected.shape
    assert (out - expected).abs().max() < tolerance * expected.abs().max()


def test_mlp() -> None:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        vision_feature_layer=-2,
    )
    theirs = randomised(LlavaMultiModalProjector(config))
    newline = torch.randn(16)
    projector = ours("mlp", "llava", {**theirs.state_dict(), "image_newline": newline})
    compare(projector, theirs, [(2, 3), (4, 4), (4, 4)])
    rows = projector.extra_rows()
    assert rows is not None and torch.equal(rows, newline[None])


@pytest.mark.parametrize("name", ["linear", "mlp_3", "mlp_4", "cross_attention"])
def test_linear_layers(name: str) -> None:
    """Against torch's own layers."""
    own = parts.PROJECTORS[name].projector
    count = 1 if own.kind == "cross_attention" else own.num_layers
    projector = build_projector(parts.PROJECTORS[name], ParallelConfig(), torch.float32)
    pieces.fill(projector)
    widths = [12, *[own.hidden_size or 16] * (count - 1), 16]
    weights = {n.removeprefix("layers."): p for n, p in projector.named_parameters()}
    act = nn.GELU(approximate="tanh" if own.activation == "gelu_tanh" else "none")
    theirs = nn.ModuleList(nn.Linear(a, b, bias=own.bias) for a, b in zip(widths, widths[1:], strict=False))
    theirs.load_state_dict({name if count > 1 else f"0.{name}": p for name, p in weights.items()})

    def run(x: Tensor) -> Tensor:
        for n, layer in enumerate(theirs):
            x = layer(act(x) if n else x)
        return x

    compare(projector, run, [(2, 3), (1, 4)])


def test_internvl() -> None:
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**VISION), text_config=transformers.Qwen2Config(**TEXT)
    )
    theirs = randomised(InternVLMultiModalProjector(config))

    def run(x: Tensor) -> Tensor:
        side = int(len(x) ** 0.5)
        shuffled = InternVLModel.pixel_shuffle(theirs, x.view(1, side, side, -1), scale_factor=0.5)
        return theirs(shuffled.flatten(0, 2))

    compare(ours("internvl", "internvl", theirs.state_dict()), run, [(4, 4), (2, 2), (2, 2)])


def test_idefics3() -> None:
    config = transformers.Idefics3Config(
        vision_config=VISION, text_config=transformers.LlamaConfig(**TEXT), scale_factor=2
    )
    theirs = randomised(Idefics3Connector(config))
    projector = ours("idefics3", "idefics3", theirs.state_dict())
    compare(projector, lambda x: theirs(x[None])[0], [(4, 4), (4, 4), (2, 2)])


@pytest.mark.parametrize(("name", "merger"), [("qwen2_vl", PatchMerger), ("qwen2_5_vl", Qwen2_5_VLPatchMerger)])
def test_qwen(name: str, merger: type[nn.Module]) -> None:
    theirs = randomised(merger(dim=16, context_dim=12, spatial_merge_size=2))
    grids = [(4, 2), (6, 4), (6, 4)]
    sizes = iter(grids)

    def run(x: Tensor) -> Tensor:
        rows, columns = next(sizes)  # Qwen's patches come in blocks of 2 x 2
        return theirs(x.view(rows // 2, 2, columns // 2, 2, -1).transpose(1, 2).reshape(len(x), -1))

    compare(ours(name, "qwen2_vl", theirs.state_dict()), run, grids)


def test_gemma3() -> None:
    config = transformers.Gemma3Config(
        vision_config={**VISION, "image_size": 56, "patch_size": 14},
        text_config=transformers.Gemma3TextConfig(**TEXT),
        mm_tokens_per_image=4,
    )
    theirs = randomised(Gemma3MultiModalProjector(config))
    projector = ours("gemma3", "gemma3", theirs.state_dict())
    compare(projector, lambda x: theirs(x[None])[0], [(4, 4), (4, 4)])


def test_qformer() -> None:
    own = parts.PROJECTORS["qformer"].projector
    config = transformers.Blip2QFormerConfig(
        hidden_size=own.hidden_size,
        num_hidden_layers=own.num_layers,
        num_attention_heads=own.num_heads,
        intermediate_size=own.ffn_hidden_size,
        encoder_hidden_size=12,
    )
    theirs, out = randomised(Blip2QFormerModel(config)), randomised(nn.Linear(20, 16))
    queries = torch.randn(1, own.num_queries, 20)
    state = {f"qformer.{name}": x for name, x in theirs.state_dict().items()}
    state |= {"query_tokens": queries, **{f"language_projection.{name}": x for name, x in out.state_dict().items()}}

    def run(x: Tensor) -> Tensor:
        return out(theirs(query_embeds=queries, encoder_hidden_states=x[None]).last_hidden_state[0])

    compare(ours("qformer", "blip2", state), run, [(2, 3), (4, 4), (4, 4), (1, 1)])


def test_qformer_sees_class_tokens() -> None:
    """A view of 2 x 3 patches then has seven features."""
    cfg = parts.model(kind="qformer", num_layers=1, **parts.QUERIES)
    cfg.vision.class_token = cfg.vision.keep_class_token = True
    projector = build_projector(cfg, ParallelConfig(), torch.float32)
    pieces.fill(projector)
    features = torch.randn(14, 12)
    both = projector(features, [(2, 3), (2, 3)])
    assert both.shape == (10, 16)
    assert torch.allclose(both[5:], projector(features[7:], [(2, 3)]), atol=1e-6)


def test_perceiver() -> None:
    own = parts.PROJECTORS["perceiver"].projector
    config = Idefics2PerceiverConfig(
        hidden_size=16,
        resampler_n_latents=own.num_queries,
        resampler_depth=own.num_layers,
        resampler_n_heads=own.num_heads,
        resampler_head_dim=own.head_dim,
        num_key_value_heads=own.num_kv_heads,
        attn_implementation="eager",
    )
    theirs, first = randomised(Idefics2PerceiverResampler(config)), randomised(nn.Linear(12, 16, bias=False))
    state = {**theirs.state_dict(), "input.weight": first.weight}
    names = [("queries", "latents"), ("norm.weight", "norm.weight"), ("input.weight", "input.weight")]
    for n in range(own.num_layers):
        names += [
            (f"layers.{n}.query_norm.weight", f"layers.{n}.input_latents_norm.weight"),
            (f"layers.{n}.context_norm.weight", f"layers.{n}.input_context_norm.weight"),
            (f"layers.{n}.cross_attention.linear_q.weight", f"layers.{n}.self_attn.q_proj.weight"),
            (f"layers.{n}.cross_attention.linear_proj.weight", f"layers.{n}.self_attn.o_proj.weight"),
            (f"layers.{n}.mlp_norm.weight", f"layers.{n}.post_attention_layernorm.weight"),
            (f"layers.{n}.mlp.linear_fc2.weight", f"layers.{n}.mlp.down_proj.weight"),
        ]
        attention, mlp = f"layers.{n}.self_attn", f"layers.{n}.mlp"
        sizes = Sizes(heads=own.num_heads, kv_heads=own.num_kv_heads or 0)
        pair = [state[f"{attention}.k_proj.weight"], state[f"{attention}.v_proj.weight"]]
        state[f"kv {n}"] = KV.join(pair, sizes)
        state[f"fc1 {n}"] = torch.cat([state[f"{mlp}.gate_proj.weight"], state[f"{mlp}.up_proj.weight"]])
        names += [
            (f"layers.{n}.cross_attention.linear_kv.weight", f"kv {n}"),
            (f"layers.{n}.mlp.linear_fc1.weight", f"fc1 {n}"),
        ]
    projector = build_projector(parts.PROJECTORS["perceiver"], ParallelConfig(), torch.float32)
    entries = (Entry(part="", ours=f".{a}", theirs=(b,), transform=IDENTITY, sizes=Sizes()) for a, b in names)
    pieces.load(projector, "", state, entries)

    def run(x: Tensor) -> Tensor:
        return theirs(context=first(x)[None], attention_mask=torch.ones(1, len(x), dtype=torch.bool))[0]

    compare(projector, run, [(2, 3), (4, 4), (4, 4), (1, 1)])


def ovis(tokenize: str) -> tuple[VisualVocabulary, Run, Ovis2VisionModel]:
    """Ours, theirs up to the embeddings, and theirs up to the probabilities: the tower is replaced by what it gives."""
    config = Ovis2VisionConfig(
        hidden_size=12,
        num_attention_heads=2,
        intermediate_size=8,
        num_hidden_layers=1,
        vocab_size=20,
        num_visual_indicator_tokens=3,
        hidden_stride=2,
        tokenize_function=tokenize,
    )
    torch.manual_seed(1)
    theirs, table = randomised(Ovis2VisionModel(config)), randomised(Ovis2VisualEmbeddingTable(20, 16))
    theirs.transformer = Given()
    state = {"visual_embeddings_table.weight": table.weight, **theirs.state_dict()}

    def run(x: Tensor) -> Tensor:
        side = int(len(x) ** 0.5)
        # transformers 5.23 pads an odd grid after it is flattened, and fails; Ovis' own code pads the grid
        even = nn.functional.pad(x.view(side, side, -1), (0, 0, 0, side % 2, 0, side % 2)).flatten(0, 1)
        return table(nn.functional.pad(theirs(even[None]).pooler_output[0], (0, 3)))

    projector = ours({"gumbel_argmax": "gumbel"}.get(tokenize, tokenize), "ovis2", state)
    assert isinstance(projector, VisualVocabulary)
    return projector, run, theirs


class Given(nn.Module):
    """In place of a tower: what goes in comes out."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


@pytest.mark.parametrize("tokenize", ["softmax", "st_argmax"])
def test_ovis2(tokenize: str) -> None:
    projector, run, _ = ovis(tokenize)
    compare(projector, run, [(4, 4), (5, 5), (5, 5), (1, 1)])
    rows = projector.extra_rows()
    assert rows is not None and torch.equal(rows, projector.table.weight[-3:])


@pytest.mark.parametrize("tokenize", ["softmax", "st_argmax", "gumbel_argmax"])
def test_visual_words(tokenize: str) -> None:
    """Rows sum to one; there is no column for an indicator, so that none gets mass; hard ones choose one word."""
    projector, _, theirs = ovis(tokenize)
    projector.train()
    features = torch.randn(7, 48)
    probabilities = projector.probabilities(features)
    assert probabilities.shape == (7, 17)
    assert (probabilities.sum(1) - 1).abs().max() < 1e-6
    embeddings = projector.project(features, [(1, 7)])
    padded = nn.functional.pad(probabilities, (0, 3))
    if tokenize != "gumbel_argmax":
        assert torch.allclose(embeddings, padded @ projector.table.weight, atol=1e-6)
    if tokenize != "softmax":
        assert ((probabilities - 1).abs() < 1e-6).sum() == 7 and (probabilities.abs() < 1e-6).sum() == 7 * 16


def test_gumbel_follows_the_probabilities() -> None:
    """With noise a word is chosen as often as softmax says; without (evaluation) the likeliest always is."""
    projector, _, _ = ovis("gumbel_argmax")
    features = torch.randn(1, 48)
    likeliest = projector.eval().probabilities(features)
    assert torch.equal(likeliest, projector.probabilities(features))
    soft, _, _ = ovis("softmax")
    expected = soft.probabilities(features)[0]
    drawn = projector.train().probabilities(features.expand(20000, -1)).mean(0)
    assert (drawn - expected).abs().max() < 0.02 and drawn.argmax() == likeliest.argmax()


def test_hard_choice_passes_the_soft_gradient() -> None:
    gradients = []
    for tokenize in ("softmax", "st_argmax"):
        projector, _, _ = ovis(tokenize)
        features = torch.randn(3, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.enable_grad():
            (projector.probabilities(features) * torch.arange(17)).sum().backward()
        gradients.append(features.grad)
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("cfg", "key"),
    [
        (parts.model(kind="qformer", num_heads=3, hidden_size=16), "model.projector.num_heads=3"),
        (parts.model(kind="qformer", norm="layernorm", **parts.QUERIES), "model.projector.norm=layernorm"),
        (parts.model(newline=True, **parts.WORDS), "model.projector.newline"),
        (parts.model(num_layers=0), "model.projector.num_layers is 0"),
        (parts.model(**{**parts.WORDS, "indicators": 20}), "model.projector.indicators=20"),
    ],
)
def test_refuses(cfg: Any, key: str) -> None:
    with pytest.raises(UserError, match=key):
        build_projector(cfg, ParallelConfig(), torch.float32)


def test_refuses_a_class_token_among_reduced_patches() -> None:
    cfg = parts.PROJECTORS["internvl"]
    cfg = parts.model(cfg.reduce)
    cfg.vision.class_token = cfg.vision.keep_class_token = True
    with pytest.raises(UserError, match="keep_class_token=false"):
        build_projector(cfg, ParallelConfig(), torch.float32)
