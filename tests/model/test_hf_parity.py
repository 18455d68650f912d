"""Our forward against transformers' LlavaForConditionalGeneration with the same random weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from tests import tiny
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.model.vision import output_tokens
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig


def llava_twin(cfg: ModelConfig) -> torch.nn.Module:
    v, lang = cfg.vision, cfg.language
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            image_size=v.image_size,
            patch_size=v.patch_size,
            hidden_size=v.hidden_size,
            num_hidden_layers=v.num_layers,
            num_attention_heads=v.num_heads,
            intermediate_size=v.ffn_hidden_size,
            hidden_act=v.activation,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=lang.vocab_size,
            hidden_size=lang.hidden_size,
            num_hidden_layers=lang.num_layers,
            num_attention_heads=lang.num_heads,
            num_key_value_heads=lang.num_kv_heads,
            intermediate_size=lang.ffn_hidden_size,
            rms_norm_eps=lang.norm_eps,
            attention_bias=False,
        ),
        image_token_index=tiny.IMAGE,
        vision_feature_layer=v.feature_layer,
        vision_feature_select_strategy="full" if v.keep_class_token else "default",
        projector_hidden_act="gelu",
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # HF starts biases at zero and norms at one, which would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def interleave_qkv(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int) -> Tensor:
    """HF's three matrices (or biases) to megatron's one: per key/value head its queries, its key, its value."""
    per = heads // kv_heads
    q, k, v = (x.view(kv_heads, n, -1, *x.shape[1:]) for x, n in ((q, per), (k, 1), (v, 1)))
    return torch.cat((q, k, v), dim=1).flatten(0, 2)


def copy_weights(hf: torch.nn.Module, ours: torch.nn.Module, cfg: ModelConfig) -> None:
    theirs = {k.removeprefix("model."): v for k, v in hf.state_dict().items()}
    new: dict[str, Tensor] = {}
    vision = "vision_tower.vision_model." if any("vision_tower.vision_model" in k for k in theirs) else "vision_tower."
    new["vision.patch_weight"] = theirs[f"{vision}embeddings.patch_embedding.weight"].flatten(1)
    new["vision.class_token"] = theirs[f"{vision}embeddings.class_embedding"]
    new["vision.position"] = theirs[f"{vision}embeddings.position_embedding.weight"]
    for end in ("weight", "bias"):
        new[f"vision.pre_norm.{end}"] = theirs[f"{vision}pre_layrnorm.{end}"]
        new[f"projector.layers.linear_fc1.{end}"] = theirs[f"multi_modal_projector.linear_1.{end}"]
        new[f"projector.layers.linear_fc2.{end}"] = theirs[f"multi_modal_projector.linear_2.{end}"]
        for i in range(cfg.vision.num_layers - 1):
            a, b = f"vision.blocks.layers.{i}.", f"{vision}encoder.layers.{i}."
            qkv = (theirs[f"{b}self_attn.{x}_proj.{end}"] for x in "qkv")
            new[f"{a}self_attention.linear_qkv.{end}"] = interleave_qkv(
                *qkv, cfg.vision.num_heads, cfg.vision.num_heads
            )
            new[f"{a}self_attention.linear_proj.{end}"] = theirs[f"{b}self_attn.out_proj.{end}"]
            new[f"{a}input_layernorm.{end}"] = theirs[f"{b}layer_norm1.{end}"]
            new[f"{a}pre_mlp_layernorm.{end}"] = theirs[f"{b}layer_norm2.{end}"]
            new[f"{a}mlp.linear_fc1.{end}"] = theirs[f"{b}mlp.fc1.{end}"]
            new[f"{a}mlp.linear_fc2.{end}"] = theirs[f"{b}mlp.fc2.{end}"]
    new["language.embedding.word_embeddings.weight"] = theirs["language_model.embed_tokens.weight"]
    new["language.decoder.final_layernorm.weight"] = theirs["language_model.norm.weight"]
    new["language.output_layer.weight"] = theirs["lm_head.weight"]
    lang = cfg.language
    for i in range(lang.num_layers):
        a, b = f"language.decoder.layers.{i}.", f"language_model.layers.{i}."
        qkv = (theirs[f"{b}self_attn.{x}_proj.weight"] for x in "qkv")
        new[f"{a}self_attention.linear_qkv.weight"] = interleave_qkv(*qkv, lang.num_heads, lang.num_kv_heads)
        new[f"{a}self_attention.linear_proj.weight"] = theirs[f"{b}self_attn.o_proj.weight"]
        new[f"{a}input_layernorm.weight"] = theirs[f"{b}input_layernorm.weight"]
        new[f"{a}pre_mlp_layernorm.weight"] = theirs[f"{b}post_attention_layernorm.weight"]
        gate, up = theirs[f"{b}mlp.gate_proj.weight"], theirs[f"{b}mlp.up_proj.weight"]
        new[f"{a}mlp.linear_fc1.weight"] = torch.cat((gate, up))
        new[f"{a}mlp.linear_fc2.weight"] = theirs[f"{b}mlp.down_proj.weight"]
    parameters = dict(ours.named_parameters())
    assert set(parameters) == set(new), set(parameters) ^ set(new)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(new[name])


@pytest.mark.parametrize("keep_class_token", [False, True])
def test_logits_and_loss_equal_transformers(keep_class_token: bool) -> None:
    cfg = tiny.tiny_model()
    cfg.vision.keep_class_token = keep_class_token
    per_image = output_tokens(cfg.vision)
    hf = llava_twin(cfg)
    samples = []
    for seed, (length, images) in enumerate([(14, 1), (23, 2), (9, 0)]):
        tokens, _, pixels = tiny.sample(seed, length + 2 * (per_image - 4), 0)
        pixels = torch.randint(0, 256, (images, 3, 16, 16), dtype=torch.uint8)
        for i in range(images):
            tokens[1 + i * (per_image + 1) :][:per_image] = tiny.IMAGE
        labels = torch.full_like(tokens, -100)
        labels[4:-1] = tokens[5:]
        labels[labels == tiny.IMAGE] = -100
        samples.append((tokens, labels, pixels))
    packed = tiny.row(samples, 80)
    with device.adapter(), torch.no_grad():
        groups.start(ParallelConfig(), seed=0)
        (ours,) = build_model(cfg, ParallelConfig(), "fp32", seed=1)
        copy_weights(hf, ours, cfg)
        batch = model_batch(
            packed, image_token=tiny.IMAGE, tokens_per_image=per_image, image_size=16, device=device.device()
        )
        logits = ours(batch, gather_logits=True)[0]
        losses = ours(batch)[0]
        start = 0
        mean, std = ours.vision.mean, ours.vision.std
        for tokens, labels, pixels in samples:
            values = (pixels.float() - mean) / std if len(pixels) else None
            theirs = hf(input_ids=tokens[None], pixel_values=values).logits[0]
            span = slice(start, start + len(tokens))
            start += len(tokens)
            assert (logits[span] - theirs).abs().max() < 1e-4
            expected = torch.nn.functional.cross_entropy(theirs, labels, ignore_index=-100, reduction="sum")
            assert (losses[span] * batch.loss_mask[0, span]).sum().item() == pytest.approx(expected.item(), rel=1e-5)
        groups.stop()
