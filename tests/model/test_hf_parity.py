"""Our forward against transformers' LlavaForConditionalGeneration with the same random weights."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests import tiny
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.weights.tables import naming_of


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


def copy_weights(hf: torch.nn.Module, ours: torch.nn.Module, cfg: ModelConfig) -> None:
    """Through the table that `convert` uses: this test is what holds it to transformers' forward."""
    naming = naming_of(cfg)
    theirs = {naming.understood(name): tensor for name, tensor in hf.state_dict().items()}
    table = {entry.ours: entry for entry in naming.entries(cfg)}
    parameters = dict(ours.named_parameters())
    assert set(parameters) == set(table), set(parameters) ^ set(table)
    with torch.no_grad():
        for name, parameter in parameters.items():
            entry = table[name]
            parameter.copy_(entry.transform.join([theirs[entry.part, name] for name in entry.theirs], entry.sizes))


@pytest.mark.parametrize("keep_class_token", [False, True])
def test_logits_and_loss_equal_transformers(keep_class_token: bool) -> None:
    cfg = tiny.tiny_model()
    cfg.vision.keep_class_token = keep_class_token
    per_image = 4 + keep_class_token
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
        batch = model_batch(packed, cfg, image_token=tiny.IMAGE, device=device.device())
        logits = ours(batch, gather_logits=True)[0]
        losses = ours(batch)
        start = 0
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) * 255 for x in (cfg.vision.mean, cfg.vision.std))
        for tokens, labels, pixels in samples:
            values = (pixels.float() - mean) / std if len(pixels) else None
            theirs = hf(input_ids=tokens[None], pixel_values=values).logits[0]
            span = slice(start, start + len(tokens))
            start += len(tokens)
            assert (logits[span] - theirs).abs().max() < 1e-4
            expected = torch.nn.functional.cross_entropy(theirs, labels, ignore_index=-100, reduction="sum")
            mine = (batch.supervised >= span.start) & (batch.supervised < span.stop)
            assert losses[mine].sum().item() == pytest.approx(expected.item(), rel=1e-5)
        groups.stop()
