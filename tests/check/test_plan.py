"""What the plan says of memory, against torch's own record of it, and of layouts, against arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.tiny import tiny_model
from vlm_nemo.check.needs import EXPERTS, StageNeeds
from vlm_nemo.check.plan import Job, _copied, needs, plan
from vlm_nemo.check.report import show, write
from vlm_nemo.check.rows import IMAGE, blank_sample, full_row
from vlm_nemo.check.sizes import FLOPS, GIB, told
from vlm_nemo.check.timeline import simulate
from vlm_nemo.data.layout.images import plan_image
from vlm_nemo.model.batch import model_batch
from vlm_nemo.model.build import build_model
from vlm_nemo.model.config import MoeConfig
from vlm_nemo.model.layout import spec_of
from vlm_nemo.model.share import embedders
from vlm_nemo.model.stages import work_of
from vlm_nemo.runtime import device, groups
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.train import optim
from vlm_nemo.train.config import OptimConfig
from vlm_nemo.train.step import run_schedule
from vlm_nemo.types import UserError


def job(parallel: ParallelConfig, world: int = 1, capacity: int = 2048, precision: str = "fp32") -> Job:
    cfg = tiny_model()
    spec = spec_of(cfg)
    size = (cfg.vision.image_size, cfg.vision.image_size)
    row = full_row(spec, blank_sample(spec, [plan_image(spec, size)], text=40), capacity)
    return Job(
        model=cfg,
        parallel=parallel,
        precision=precision,
        optim=OptimConfig(projector_lr=1e-3, language_lr=1e-3),
        global_packs=8,
        micro_packs=1,
        capacity=capacity,
        world=world,
        batch=lambda layout: model_batch(
            row,
            cfg,
            image_token=IMAGE,
            device=torch.device("cpu"),
            context=(0, layout.context),
            sharing=(0, embedders(layout, kept=False).ranks),
        ),
        work=work_of([row], cfg),
    )


def measured(made: Job) -> int:
    """Bytes of the worst moment of one micro-batch beyond weights and gradients, as torch's profiler recorded them."""
    with device.adapter():
        groups.start(made.parallel, seed=0)
        chunks = build_model(made.model, made.parallel, made.precision, 0)
        optim.freeze(chunks, optim.part_rates(made.optim))
        model = optim.wrap(chunks, made.parallel)
        for chunk in model:
            chunk.config.finalize_model_grads_func = chunk.config.grad_scale_func = None
        run_schedule(model, [made.batch(made.parallel)])
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            run_schedule(model, [made.batch(made.parallel)])
        groups.stop()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(("recompute", "vision"), [("none", None), ("selective", None), ("full", None), ("full", 1e-3)])
def test_predicted_memory_is_what_the_step_took(recompute: str, vision: float | None) -> None:
    """vision: the tower's rate, where it learns; then it recomputes too."""
    made = job(ParallelConfig(recompute=recompute, recompute_vision="full" if vision else "none"))
    made = replace(made, optim=replace(made.optim, vision_lr=vision))
    (predicted,) = needs(made)
    assert predicted.activations == pytest.approx(measured(made), rel=0.02)
    fixed = predicted.weights + predicted.gradients
    with device.adapter():
        groups.start(made.parallel, seed=0)
        chunks = build_model(made.model, made.parallel, made.precision, 0)
        optim.freeze(chunks, optim.part_rates(made.optim))
        model = optim.wrap(chunks, made.parallel)
        optimizer = optim.build_optimizer(made.optim, made.parallel, made.precision, model)
        tensors = [p.data for chunk in chunks for p in chunk.parameters()]
        tensors += [buffer.grad_data for chunk in model for buffer in chunk.buffers]
        held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
        trained = sum(part.stop - part.start for part in optim.optimizer_slices(optimizer))
        groups.stop()
    assert fixed == held
    assert predicted.optimizer == 8 * trained


def test_a_layout_of_many_ranks_shares_out_what_one_rank_holds() -> None:
    (alone,) = needs(job(ParallelConfig()))
    stages = needs(job(ParallelConfig(tensor=2, pipeline=2, sequence=True), world=8))
    assert [list(stage.parameters) for stage in stages] == [["vision", "projector", "language"], ["language"]]
    # Norms, positions and what is added behind a row-parallel product are on both tensor ranks
    assert alone.weights / 2 < sum(s.weights for s in stages) < alone.weights / 2 * 1.15
    assert stages[0].sent["send"] > 0 and stages[1].sent["recv"] > 0
    assert all(stage.data_sent > 0 for stage in stages)
    flops = sum(sum(stage.forward_flops) for stage in stages) * 2
    assert flops == pytest.approx(sum(alone.forward_flops), rel=0.02)
    # A frozen tower has no backward pass, a trained decoder one of twice the forward
    assert 1.0 < stages[1].backward_flops[0] / stages[1].forward_flops[0] <= 2.1


def test_chunks_of_the_interleaved_schedule_are_counted_one_by_one() -> None:
    """One layer each; the images are in the first of the four, the head is in the last."""
    made = job(ParallelConfig(pipeline=2, virtual=2), world=2)
    found = plan(made, memory_gib=1.0, reserve_gib=0.0, assumed="made up")
    first, last = (StageNeeds(**stage) for stage in found.data["stages"])
    (alone,) = needs(job(ParallelConfig()))
    images, layer = first.forward_flops
    same, head = last.forward_flops
    assert same == layer and images > layer and head > layer
    assert first.backward_flops[1] == last.backward_flops[0] == pytest.approx(2 * layer, rel=0.1)
    for kind in ("forward_flops", "backward_flops"):
        assert sum((*getattr(first, kind), *getattr(last, kind))) == pytest.approx(sum(getattr(alone, kind)), rel=0.01)
    line = simulate([first.forward_flops, last.forward_flops], [first.backward_flops, last.backward_flops], 8)
    assert (found.data["bubble"], found.data["balance"]) == (line.bubble, line.balance)
    assert found.data["in_flight"] == (5, 3)
    assert [row[3] for row in found.tables[1].rows] == ["5", "3"]
    # As one chunk a stage the same work waits for whole stages
    stages = (first, last)
    whole = simulate([[sum(s.forward_flops)] for s in stages], [[sum(s.backward_flops)] for s in stages], 8)
    assert line.bubble < whole.bubble


@pytest.mark.slow
def test_more_micro_batches_need_no_more_memory_than_are_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = job(ParallelConfig(pipeline=2, virtual=2), world=2)
    first, last = (stage.activations for stage in needs(made))
    monkeypatch.setattr("vlm_nemo.check.needs._enough", lambda parallel, micro: micro)
    # Four of the eight are rehearsed; the last stage keeps a loss and a count, in fp32, of each
    assert [stage.activations for stage in needs(made)] == [first, last + 4 * 8]
    monkeypatch.setattr("vlm_nemo.check.needs._enough", lambda parallel, micro: 2)
    assert needs(made)[0].activations < first


def test_experts_are_shared_out_and_their_tokens_counted() -> None:
    """In a rehearsal every expert gets its even share of the tokens: two of four experts compute half of their work."""
    moe = MoeConfig(experts=4, top_k=2, ffn_hidden_size=24, aux_loss=0.01)

    def sparse(parallel: ParallelConfig, world: int = 1) -> Job:
        made = job(parallel, world)
        return replace(made, model=replace(made.model, language=replace(made.model.language, moe=moe)))

    finding = plan(sparse(ParallelConfig(expert=2), world=2), memory_gib=8, reserve_gib=0.0, assumed="made up")
    (alone,), shared = needs(sparse(ParallelConfig())), StageNeeds(**finding.data["stages"][0])
    assert alone.experts == 4 * 4 * 3 * 24 * 32 and shared.experts * 2 == alone.experts
    assert sum(alone.parameters.values()) - sum(shared.parameters.values()) == shared.experts
    assert shared.forward_flops == pytest.approx(alone.forward_flops, rel=0.01)  # half of twice as many tokens
    sent = sum(size for name, size in shared.sent.items() if name.startswith(EXPERTS))
    # A layer and micro-batch: its tokens to the other rank, what its experts made of that one's back, both again for
    # the gradients; the weights of four experts in fp32 likewise, and which were chosen
    assert sent == 4 * 4 * 2048 * (32 * 4 * (1 + 1 + 1 + 1) + 4 * 4 * (1 + 1) + 4)
    assert not any(name.startswith(EXPERTS) for name in alone.sent)
    assert finding.tables[1].columns[-2:] == ("experts M", "to experts MiB")


def test_what_a_checkpoint_copies_and_a_step_computes_is_told() -> None:
    """A copy holds weights and moments of what is trained, shared out over the replicas."""
    made = job(ParallelConfig(), world=2)
    found = plan(made, memory_gib=80, reserve_gib=6, assumed="")
    assert found.ok
    trained = found.data["stages"][0]["trained"]
    copied = _copied(made, [StageNeeds(**found.data["stages"][0])])
    assert copied == trained * 12 / 2
    assert f"copies {told(copied)} a rank to the host's memory" in found.notes[-1]
    # As large as they are: a tiny model's are not nothing, and its bar is seen beside a limit of thousands of it
    assert told(copied).endswith("KiB") and "MiB" in found.tables[0].title and found.verdict.endswith("of 74.00 GiB")
    assert "0.00" not in found.tables[0].rows[0]
    assert found.tables[0].title.endswith("2 ranks, 2 replicas, 4 micro-batches")
    (axis,) = found.figures[0][1].axes
    assert axis.get_xlabel().startswith("MiB; the limit of 74.00 GiB is far")
    assert max(bar.get_width() for bar in axis.patches) > 0.2 * axis.get_xlim()[1]
    # So is its arithmetic, which is not 0.01 of a large model's unit
    work, (stage,) = found.tables[1], found.data["stages"]
    computed = made.micro * (sum(stage["forward_flops"]) + sum(stage["backward_flops"]))
    assert work.title == f"a step of one replica, {told(computed, FLOPS)}"
    assert f"{work.rows[0][work.columns.index('GFLOP')]} GFLOP" == told(computed, FLOPS) and computed > 1e9


@pytest.mark.slow
def test_the_plan_follows_the_cut_and_says_what_would_balance_it() -> None:
    given = job(ParallelConfig(tensor=2, vision=1, pipeline=2, layers=[3, 1]), world=4)
    finding = plan(given, memory_gib=1.0, reserve_gib=0.0, assumed="made up")
    assert finding.data["layers"] == [3, 1] and finding.data["balance"] > 1.3
    assert "(parallel.layers=[3,1]; parallel.layers=[] makes it 1.0" in finding.verdict
    assert "2 ranks share out the images of a row, the busiest does 1.0" in " ".join(finding.notes)
    better = plan(
        replace(given, parallel=replace(given.parallel, layers=[])), memory_gib=1.0, reserve_gib=0.0, assumed="made up"
    )
    assert better.data["layers"] == [2, 2] and better.data["balance"] < 1.15
    assert better.data["bubble"] < finding.data["bubble"]
    split = plan(
        replace(given, parallel=replace(given.parallel, vision=None)),
        memory_gib=1.0,
        reserve_gib=0.0,
        assumed="made up",
    )
    # Matrices are whole or halved; patches' own and positions are whole in either
    first, second = (found.data["stages"][0] for found in (finding, split))
    assert first["parameters"]["vision"] > 1.3 * second["parameters"]["vision"]


def test_half_precision_halves_weights_and_adds_fp32_copies() -> None:
    (full,), (half,) = needs(job(ParallelConfig())), needs(job(ParallelConfig(), precision="bf16"))
    assert half.weights * 2 == full.weights
    assert half.gradients == full.gradients
    assert half.optimizer == full.optimizer * 12 // 8


def test_what_does_not_fit_is_said_with_a_knob_that_helps(tmp_path: Path) -> None:
    made = job(ParallelConfig(), world=2)
    (stage,) = needs(made)
    (again,) = needs(replace(made, parallel=replace(made.parallel, recompute="full")))
    (part,) = needs(replace(made, parallel=replace(made.parallel, recompute="selective")))
    assert stage.peak > part.peak > again.peak
    limit = (part.peak + again.peak) / 2 / GIB
    finding = plan(made, memory_gib=limit, reserve_gib=0.0, assumed="made up")
    assert not finding.ok
    assert "parallel.recompute=full" in finding.verdict
    page = write(tmp_path, [finding], "tiny")
    assert "parallel.recompute=full" in page.read_text() and "data:image/png;base64," in page.read_text()


def test_a_layout_of_other_ranks_names_the_key() -> None:
    with pytest.raises(UserError, match="^on check.world=3 ranks: .* takes a multiple of 2 ranks, and 3 were started"):
        plan(job(ParallelConfig(tensor=2), world=3), memory_gib=1.0, reserve_gib=0.0, assumed="made up")


def test_nothing_helps_where_nothing_can(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    finding = plan(job(ParallelConfig()), memory_gib=0.0001, reserve_gib=0.0, assumed="made up")
    show([finding], Console(width=200))
    assert "use more ranks" in finding.verdict
    assert finding.tables[0].title.endswith("1 rank, 1 replica, 8 micro-batches")
    assert "FAILED" in capsys.readouterr().out


def test_peaks_add_up() -> None:
    (stage,) = needs(job(ParallelConfig()))
    assert isinstance(stage, StageNeeds)
    assert stage.peak == stage.weights + stage.gradients + stage.optimizer + stage.activations


def test_context_ranks_hold_half_of_a_row() -> None:
    """Activations halve but for what images and the keys of the whole row take; every parameter is on both."""
    (alone,) = needs(job(ParallelConfig(), capacity=4096))
    (half,) = needs(job(ParallelConfig(context=2), world=2, capacity=4096))
    assert half.weights == alone.weights and half.optimizer == pytest.approx(alone.optimizer / 2, rel=0.01)
    assert alone.activations / 2 < half.activations < alone.activations * 0.7
    assert half.data_sent > 0
    own = 4 * 2048 * 2 * 2 * 8 * 4 * 8  # layers, its tokens, keys and values, heads, their width, fp32, micro-batches
    assert half.sent["context allgather_base"] == half.sent["context reduce_scatter_base"] == own
