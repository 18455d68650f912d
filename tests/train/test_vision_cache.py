"""A run with data.vision_cache is the run without it, to the bit: cold, warm, resumed, in every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import runs, tiny
from tests.data.raw_data import data_config, make_prepared, write_all_lengths
from tests.ranks import run_ranks
from vlm_nemo.data.config import AugmentConfig, DataConfig, PackConfig
from vlm_nemo.model.config import ModelConfig, MoeConfig
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.train.vision_cache import check_cache
from vlm_nemo.types import UserError

STEPS = 4


def words(shards: Path, run_dir: Path, *more: str) -> list[str]:
    base = [*runs.TINY, *runs.data_words(shards), f"run_dir={run_dir}", f"trainer.steps={STEPS}", "checkpoint.every=2"]
    return [*base, "optim.vision_lr=null", *more]


def test_cold_warm_and_resumed_runs_are_the_run_without(shards: Path, tmp_path: Path) -> None:
    cache = f"data.vision_cache={tmp_path}/cache"
    runs.vlm_nemo("train", *words(shards, tmp_path / "without"))
    cold = runs.vlm_nemo("train", *words(shards, tmp_path / "cold", cache))
    (tower,) = (tmp_path / "cache").iterdir()
    (held,) = tower.glob("*.features")
    first = held.stat().st_size
    warm = runs.vlm_nemo("train", *words(shards, tmp_path / "warm", cache, "trainer.stop_at=2"))
    assert "features of 0 images read" in cold.stdout, cold.stdout
    assert ", of 0 kept" in warm.stdout and "of 0 images" not in warm.stdout, warm.stdout
    assert list(tower.glob("*.features")) == [held] and held.stat().st_size == first > 0

    # It goes on after half of it was damaged: that costs time, not truth
    with held.open("r+b") as file:
        file.write(bytes(first // 2))
    mended = runs.vlm_nemo("train", *words(shards, tmp_path / "warm", cache))
    assert "were damaged and computed anew" in mended.stdout and ", of 0 kept" not in mended.stdout
    expected = runs.trace(tmp_path / "without")
    assert [runs.trace(tmp_path / name) for name in ("cold", "warm")] == [expected, expected]


def test_a_name_stands_for_all_that_features_depend_on() -> None:
    """The tower's weights, sizes, way of cutting, type: another name for each; not the text, not the decoder."""
    import torch

    from vlm_nemo.data.config import LayoutConfig
    from vlm_nemo.model.build import build_model
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train.vision_cache import describe

    cfg, parallel = tiny.tiny_model(), ParallelConfig()
    with device.adapter():
        groups.start(parallel, seed=0)
        (model,) = build_model(cfg, parallel, "fp32", seed=0)
        again, other = (build_model(cfg, parallel, "fp32", seed=seed)[0].vision for seed in (0, 1))

        def name(tower: torch.nn.Module = model.vision, changed: ModelConfig = cfg, **how: Any) -> str:
            return describe(tower, changed, parallel, how.get("dtype", torch.float32))[0]

        with torch.no_grad():
            again.blocks.layers[0].mlp.linear_fc1.weight[0, 0] += 1e-6
        changes = [
            name(again),
            name(other),
            name(dtype=torch.bfloat16),
            name(changed=replace(cfg, layout=LayoutConfig(aspect="crop"))),
            name(changed=replace(cfg, layout=LayoutConfig(aspect="squash", resample="bilinear"))),
            name(changed=replace(cfg, vision=replace(cfg.vision, std=[0.5, 0.5, 0.4]))),
            name(changed=replace(cfg, vision=replace(cfg.vision, feature_layer=-1))),
        ]
        assert len({name(), *changes}) == 1 + len(changes)
        assert name(build_model(cfg, parallel, "fp32", seed=0)[0].vision) == name()
        assert name(changed=replace(cfg, layout=replace(cfg.layout, before="<img>"))) == name()
        assert name(changed=replace(cfg, language=replace(cfg.language, num_layers=2))) == name()
        groups.stop()


def test_refusals() -> None:
    frozen, cached = OptimConfig(language_lr=1e-3), DataConfig(vision_cache="cache")
    check_cache(cached, frozen)
    check_cache(DataConfig(), OptimConfig(vision_lr=1e-3))
    check_cache(DataConfig(vision_cache="cache", augment=AugmentConfig(text_dropout=0.5)), frozen)
    with pytest.raises(UserError, match="optim.vision_lr=0.001 trains it"):
        check_cache(cached, OptimConfig(vision_lr=1e-3))
    for change in (dict(crop_scale=[0.5, 1.0]), dict(brightness=0.1), dict(hue=0.1)):
        with pytest.raises(UserError, match="data.augment changes images at random"):
            check_cache(DataConfig(vision_cache="cache", augment=AugmentConfig(**change)), frozen)


LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": dict(pipeline=2),
    "dp2": dict(),
    "cp2": dict(context=2),
}
"""A stage without a tower, two that keep, one that keeps for two."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with no, one and several images."""
    folder = make_prepared(tmp_path_factory.mktemp("raw"))
    write_all_lengths(folder)
    return folder


def history(
    prepared: Path,
    layout: dict[str, Any],
    cache: str | None,
    precision: str = "bf16",
    moe: MoeConfig | None = None,
    shared: bool = False,
) -> tuple[list[Any], tuple[int, int, int]]:
    """(loss, gradient norm) of a few steps on this rank's job, and what its store counted.

    In bf16, for some of the images come again in other rows (see the test of what stands beside an image).
    shared: without a cache ranks share out a row's images where they can, as in training.
    """
    from vlm_nemo.data.config import LayoutConfig
    from vlm_nemo.data.feed import Feed
    from vlm_nemo.data.layout.spec import image_spec
    from vlm_nemo.data.loader import Loader
    from vlm_nemo.data.tokenizer import Tokenizer
    from vlm_nemo.model.batch import model_batch
    from vlm_nemo.model.build import build_model
    from vlm_nemo.model.share import embedders
    from vlm_nemo.runtime import device, groups
    from vlm_nemo.train import optim, step
    from vlm_nemo.train.vision_cache import open_store, start_keeping

    parallel, cfg = ParallelConfig(**layout), tiny.tiny_model(**({} if moe is None else {"moe": moe}))
    cfg.language.vocab_size, cfg.language.max_positions = 320, 128
    rates, tokenizer = OptimConfig(projector_lr=1e-2, language_lr=1e-2), Tokenizer(prepared / "tokenizer")
    pack = PackConfig(capacity=128, pool=16)
    data_cfg = data_config(prepared, global_packs=4, pack=pack, vision_cache=cache)
    ranks = groups.lay_out(parallel, seed=0)
    where = dict(dp_rank=ranks.data_rank, dp_size=ranks.data)
    spec = image_spec(LayoutConfig(aspect="squash"), size=16, patch=8)
    store, keeper = open_store(data_cfg, ranks), None
    feed = Feed(lambda: Loader(data_cfg, spec, tokenizer, seed=5, max_tokens=128, features=store, **where), ranks)
    chunks = build_model(cfg, parallel, precision, seed=0)
    optim.freeze(chunks, optim.part_rates(rates))
    model = optim.wrap(chunks, parallel)
    optimizer = optim.build_optimizer(rates, parallel, precision, model)
    step.prepare_model(model)
    if cache:
        keeper = start_keeping(store, chunks, cfg, parallel, precision)
    sharing = embedders(parallel, kept=cache is not None).place if shared else (0, 1)
    found = []
    for number in range(1, STEPS + 1):
        rows = feed.next().batches
        how: dict[str, Any] = dict(image_token=tokenizer.image_id, device=device.device(), sharing=sharing)
        context = (ranks.context_rank, ranks.context)
        batches = [model_batch(row, cfg, context=context, **how) for row in rows]
        if keeper:
            batches = [keeper.keeping(batch, row) for batch, row in zip(batches, rows, strict=True)]
        optim.set_rates(optimizer, rates, number, STEPS)
        result = step.train_step(model, optimizer, batches, rates.clip_grad)
        speaks = ranks.last_stage and ranks.tensor_rank == 0
        total, count = groups.sum_over([result.loss_sum * speaks, result.loss_tokens * speaks])
        found.append((total / count, result.grad_norm))
    feed.close()
    if keeper:
        keeper.close()
    return found, (store.read_images, store.kept_images, store.damaged_images) if store else (0, 0, 0)


def histories(prepared: Path, folder: Path, layouts: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """Without a cache, with an empty one, with the one that this filled."""
    from vlm_nemo.runtime import device, groups

    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        return {
            name: [history(prepared, layout, cache) for cache in (None, f"{folder}/{name}", f"{folder}/{name}")]
            for name, layout in layouts.items()
        }


def check(ranks: list[dict[str, list[Any]]]) -> None:
    for name in ranks[0]:
        for rank in ranks:
            (without, _), (cold, _), (warm, _) = rank[name]
            assert without == cold == warm, name
        read, kept, _ = (sum(counts) for counts in zip(*(rank[name][2][1] for rank in ranks), strict=True))
        assert read > 20 and kept == 0, name
        assert sum(rank[name][1][1][1] for rank in ranks) > 20, name


def test_every_layout_is_what_it_is_without(prepared: Path, tmp_path: Path) -> None:
    check(run_ranks(histories, 2, prepared, tmp_path, LAYOUTS))


@pytest.mark.slow
def test_tensor_ranks(prepared: Path, tmp_path: Path) -> None:
    check(run_ranks(histories, 2, prepared, tmp_path, {"tp2": dict(tensor=2)}))


@pytest.mark.slow
def test_layouts_of_four(prepared: Path, tmp_path: Path) -> None:
    layouts = {
        "tp2_sp_pp2": dict(tensor=2, sequence=True, pipeline=2),
        "pp2_vpp2_dp2": dict(pipeline=2, virtual=2),
        "tp2_dp2": dict(tensor=2),
    }
    check(run_ranks(histories, 4, prepared, tmp_path, layouts))


SHARING: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "tp2_v1": dict(tensor=2, vision=1),
        "cp2": dict(context=2),
        "ep2": dict(expert=2, tensor=2, vision=1, sequence=True),
    },
    4: {
        "tp2_v1_pp2": dict(tensor=2, vision=1, pipeline=2, expert=2),
        "cp2_pp2_vpp2": dict(context=2, pipeline=2, virtual=2),
        "tp2_v1_cp2": dict(tensor=2, vision=1, context=2, sequence=True),
    },
}
"""Without the cache these ranks share out a row's images."""


def shared_histories(prepared: Path, folder: Path, layouts: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """In fp32, of a model with experts: as `histories`."""
    from vlm_nemo.runtime import device, groups

    moe, found = MoeConfig(experts=4, ffn_hidden_size=24, aux_loss=0.1), {}
    with device.adapter():
        groups.start(ParallelConfig(), seed=0)
        for name, layout in layouts.items():
            caches = (None, f"{folder}/{name}", f"{folder}/{name}")
            found[name] = [history(prepared, layout, cache, "fp32", moe, shared=True) for cache in caches]
        groups.stop()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", SHARING)
def test_ranks_that_share_out_images_train_alike_with_it(prepared: Path, tmp_path: Path, world: int) -> None:
    (alone,) = run_ranks(shared_histories, 1, prepared, tmp_path, {"alone": {}})
    truth, layouts = alone["alone"][0][0], SHARING[world]
    for rank in run_ranks(shared_histories, world, prepared, tmp_path, layouts):
        for name in layouts:
            for found, _ in rank[name]:
                for step, true in zip(found, truth, strict=True):
                    assert step == pytest.approx(true, rel=1e-5), name


@pytest.mark.slow
def test_four_ranks_resume_with_the_features_of_another_layout(shards: Path, tmp_path: Path) -> None:
    """Whole towers: what four ranks kept is what one process reads, and the other way round."""
    four = ["parallel.pipeline=2", "parallel.tensor=2", "parallel.vision=1"]

    def train(name: str, *more: str, ranks: int = 1) -> str:
        return runs.vlm_nemo("train", *words(shards, tmp_path / name, *more), ranks=ranks).stdout

    train("without")
    cache = f"data.vision_cache={tmp_path}/cache"
    assert "features of 0 images read" in train("cold", *four, cache, "trainer.stop_at=2", ranks=4)
    assert ", of 0 kept" not in train("cold", cache)
    for name, first, last in (("up", 1, 4), ("down", 4, 1)):
        for ranks, stop in ((first, 2), (last, STEPS)):
            layout = four if ranks == 4 else []
            said = train(name, *layout, cache, f"trainer.stop_at={stop}", ranks=ranks)
            assert ", of 0 kept" in said and "of 0 images" not in said, said
    truth = runs.trace(tmp_path / "without")
    for name in ("cold", "up", "down"):
        for found, true in zip(runs.trace(tmp_path / name), truth, strict=True):
            assert found == pytest.approx(true, rel=1e-5), name


def test_an_image_has_the_same_features_whatever_stands_beside_it() -> None:
    """What makes features of one epoch those of the next: to the bit in bf16 here, to the last one in fp32."""
    import torch

    from tests.model import parts, pieces
    from vlm_nemo.model.views import vision_batch
    from vlm_nemo.model.vision import VisionTower
    from vlm_nemo.runtime import device, groups

    with device.adapter(), torch.no_grad():
        groups.start(ParallelConfig(), seed=0)
        for dtype, bound in ((torch.bfloat16, 0.0), (torch.float32, 5e-7)):
            for name, cfg in parts.TOWERS.items():
                tower, grids = VisionTower(cfg, ParallelConfig(), dtype), parts.grids_of(cfg)
                pieces.fill(tower)
                patches = parts.random_patches(grids)
                together = tower(vision_batch(patches, grids, cfg)).float()
                views = zip(patches.split([rows * columns for rows, columns in grids]), grids, strict=True)
                alone = torch.cat([tower(vision_batch(part, [grid], cfg)) for part, grid in views]).float()
                assert (alone - together).abs().max() <= bound * together.abs().max(), name
        groups.stop()
