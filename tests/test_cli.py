"""The command line as a person meets it: help, errors, exit codes, processes."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlm_nemo import cli
from vlm_nemo.cli import main
from vlm_nemo.model.config import MoeConfig, RopeScaling
from vlm_nemo.options import options
from vlm_nemo.runtime import local
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.runtime.layout import check_layout
from vlm_nemo.types import UserError
from vlm_nemo.verbs.table import VERBS

from .tiny import tiny_model

ROOT = Path(__file__).parent.parent
LAUNCH = str(ROOT / "launch" / "local.sh")
HELP_CPU_S = 0.5


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    full = {**clean, "VLM_NEMO_PYTHON": sys.executable, **env}
    return subprocess.run(command, cwd=ROOT, env=full, capture_output=True, text=True, check=False)


def python(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "vlm_nemo", *words, **env)


# --- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("--help",), *((verb, "--help") for verb in VERBS)], ids=" ".join)
def test_help_takes_under_half_a_second_of_cpu(words: tuple[str, ...]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = python(*words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < HELP_CPU_S


@pytest.mark.parametrize("words", ["'--help'", "'train', '--help'", "'train', 'recipe=shapes/stage1', '--validate'"])
def test_nothing_heavy_is_imported(words: str) -> None:
    heavy = ["torch", "megatron", "numpy", "transformers", "rich"] + ([] if "valid" in words else ["hydra"])
    code = f"""import sys
from vlm_nemo.cli import main
code = main([{words}])
sys.exit(code or bool(set(sys.modules) & set({heavy})))"""
    assert run(sys.executable, "-c", code).returncode == 0


def test_root_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in VERBS.values():
        assert re.search(rf"^  {verb.name} +{re.escape(verb.summary)}$", text, flags=re.MULTILINE)
    assert main([]) == 0


@pytest.mark.parametrize("name", VERBS)
def test_verb_help_lists_every_option_with_type_default_and_description(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = VERBS[name]
    assert main([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(f"  {example}" in lines for example in verb.examples)
    joined = " ".join(" ".join(lines).split())
    for key, option in options(verb.root).items():
        (line,) = (line for line in lines if line.startswith(f"  {key}="))
        assert f"({option.type_name}" in line
        assert option.doc in joined
        assert all(choice in joined for choice in option.choices)
    assert max(map(len, lines)) <= 130


def test_a_reader_that_has_seen_enough_is_no_bug() -> None:
    done = run("bash", "-c", f"{sys.executable} -m vlm_nemo train --help | true; echo ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_help_shows_the_defaults_that_a_verb_starts_with(capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert "  run_dir=runs/${recipe}/eval  (text)" in text  # conf/evaluate.yaml
    assert "  optim.vision_lr=null  (float | null)" in text  # the dataclass
    assert "  model.language.hidden_size=4096  (int)" in text  # conf/model/llava15_7b.yaml
    assert "  checkpoint.load=…  (text | null, one of these 3 needed)" in text
    assert "recipes: llava15_7b/stage1, " in text


# --- errors and exit codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "no verb 'trian'; did you mean train?"),
        (["train", "--valdate"], "no flag --valdate; did you mean --validate?"),
        (["train", "trainer.stepz=5"], "no option trainer.stepz; did you mean trainer.steps?"),
        (["train"], "data.sources is not set: "),
        (["train", "data.sources.a.path=x"], "data.tokenizer is not set: "),
        (
            ["evaluate", "recipe=shapes/stage3"],
            "name the model, as one of checkpoint=DIR, evaluate.hf=DIR, evaluate.export=DIR",
        ),
        (["evaluate", "checkpoint=x"], "evaluate.data is not set: "),
        (["generate", "checkpoint=x"], "prompt is not set: "),
        (["generate", "prompt=x"], "name the model, as one of checkpoint=DIR, hf=DIR, export=DIR"),
        (
            ["generate", "prompt=x", "hf=a", "export=b"],
            "name the model, as one of checkpoint=DIR, hf=DIR, export=DIR (not hf, export)",
        ),
        (["prepare"], "manifest is not set: "),
        (["train", "recipe=shapes/stage1", "parallel.tensor=3"], "parallel.tensor=3 does not divide "),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {says}")
    assert captured.err.count("\n") == 1


def test_only_rank_0_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("VLM_NEMO_ERROR_FILE", str(tmp_path / "1"))
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == ""
    assert (tmp_path / "1").read_text() == "error: no verb 'trian'; did you mean train?"


def test_a_bug_shows_its_traceback_and_the_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setitem(VERBS, "prepare", replace(VERBS["prepare"], run="tests.test_cli:no_such_function"))
    assert main(["prepare", "a", "out=b"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("rank 3 failed:\nTraceback") and "no_such_function" in error


def test_the_composed_object_reaches_the_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    module = SimpleNamespace(prepare=seen.append)
    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module={"vlm_nemo.data.prepare.run": module}.get))
    assert main(["prepare", "a/b.yaml", "out=c"]) == 0
    assert seen == [VERBS["prepare"].root(manifest="a/b.yaml", out="c")]


@pytest.mark.parametrize("verb", VERBS)
def test_the_functions_of_the_table_exist(verb: str) -> None:
    module, _, function = VERBS[verb].run.partition(":")
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert f"\ndef {function}(" in path.read_text()


def test_validate_and_cfg_stop_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe=shapes/stage1", "--validate"]) == 0
    assert capsys.readouterr().out == "ok\n"
    assert main(["train", "recipe=shapes/stage1", "--cfg"]) == 0
    assert "run_dir: runs/shapes/stage1\n" in capsys.readouterr().out
    assert main(["--version"]) == 0


# --- layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "world", "packs", "says"),
    [
        (
            dict(tensor=3),
            3,
            6,
            "parallel.tensor=3 does not divide model.language.num_heads=4; .* parallel.tensor=1 or 2 or 4$",
        ),
        (dict(tensor=8), 8, 8, "parallel.tensor=8 does not divide model.language.num_heads=4"),
        (dict(pipeline=8), 8, 8, "parallel.pipeline=8 is deeper than model.language.num_layers=4"),
        (dict(pipeline=3, layers=[2, 2]), 3, 3, r"parallel.layers=\[2, 2\] must be 3 numbers \(parallel.pipeline=3\)"),
        (
            dict(pipeline=2, layers=[4, 0]),
            2,
            8,
            "at least 1 each but for the first, that sum to model.language.num_layers=4; or ",
        ),
        (dict(pipeline=2, layers=[1, 2]), 2, 8, "sum to model.language.num_layers=4"),
        (dict(pipeline=2, virtual=2, layers=[2, 2]), 2, 8, "must be 4 numbers .* x parallel.virtual=2"),
        (dict(tensor=4, vision=2), 4, 8, r"parallel.vision=2: .*parallel.tensor=4\) or whole on every rank \(1\)"),
        (dict(vision=2), 1, 8, "parallel.vision=2: "),
        (dict(pipeline=2, virtual=4), 2, 8, r"parallel.pipeline=2 x parallel.virtual=4 is deeper than"),
        (dict(virtual=2), 1, 8, "parallel.virtual=2 needs parallel.pipeline > 1"),
        (dict(pipeline=2, virtual=2), 4, 2, "the interleaved schedule .* make data.global_packs a multiple of 4 or"),
        (dict(pipeline=2, virtual=2), 2, 3, "the interleaved schedule .* make data.global_packs a multiple of 2 or"),
        (dict(context=0), 1, 8, "parallel.context=0: the smallest is 1"),
        (dict(tensor=2, context=2), 2, 8, "parallel.context=2 takes a multiple of 4 ranks, and 2 were started"),
        (dict(context=2), 6, 8, "6 ranks make 3 data-parallel ranks, .* start 4 ranks or"),
        (dict(context=3), 3, 8, "parallel.context=3 cuts each row into 6 chunks, .* make it a multiple of 6$"),
        (dict(sequence=True), 1, 8, "parallel.sequence=true needs parallel.tensor > 1"),
        (dict(overlap_param_gather=True), 2, 8, "overlap_param_gather=true needs parallel.overlap_grad_reduce=true"),
        (
            dict(overlap_param_gather=True, overlap_grad_reduce=True, distributed_optimizer=False),
            2,
            8,
            "overlap_param_gather=true needs parallel.distributed_optimizer=true",
        ),
        (dict(tensor=0), 1, 8, "parallel.tensor=0: the smallest is 1"),
        (dict(tensor=2), 3, 8, "takes a multiple of 2 ranks, and 3 were started"),
        (dict(tensor=2, pipeline=2), 1, 8, "takes a multiple of 4 ranks, and 1 was started"),
        (
            dict(),
            3,
            8,
            "3 ranks make 3 data-parallel ranks, .* start 2 ranks or make data.global_packs a multiple of 3",
        ),
        (dict(tensor=2), 16, 4, "16 ranks make 8 data-parallel ranks, .* start 8 ranks or"),
    ],
)
def test_a_layout_that_does_not_fit(layout: dict[str, Any], world: int, packs: int, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check_layout(ParallelConfig(**layout), tiny_model(), world_size=world, global_packs=packs, capacity=64)
    assert "\n" not in str(caught.value)


def test_heads_that_do_not_fit_the_width() -> None:
    for part, key, value in (("language", "num_kv_heads", 3), ("language", "num_heads", 5), ("vision", "num_heads", 3)):
        model = tiny_model()
        setattr(getattr(model, part), key, value)
        with pytest.raises(UserError, match=rf"model.{part}.{key}={value} does not divide model.{part}\."):
            check_layout(ParallelConfig(), model, world_size=1, global_packs=1)


def test_key_value_heads_that_tensor_ranks_cannot_share() -> None:
    model = tiny_model()
    model.language.num_heads, model.language.num_kv_heads = 12, 6
    model.language.head_dim = 8
    model.vision.hidden_size, model.vision.num_heads = 48, 12
    with pytest.raises(UserError, match=r"neither divides model.language.num_kv_heads=6 nor .*tensor=1 or 2$"):
        check_layout(ParallelConfig(tensor=4), model, world_size=4)
    model.language.num_kv_heads = 1
    check_layout(ParallelConfig(tensor=4), model, world_size=4)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (dict(mrope_section=[1, 1, 1]), r"mrope_section=\[1, 1, 1\] must be three numbers that sum to 4"),
        (dict(mrope_section=[2, 2]), "must be three numbers that sum to 4"),
        (dict(head_dim=7), "7 wide .* make model.language.head_dim even"),
        (dict(window=0), "window=0: the smallest is 1; null turns it off"),
        (dict(global_every=2), "global_every=2 is of layers with a window; set model.language.window"),
        (dict(rope_local_base=1e4), "rope_local_base=10000.0 is of layers with a window"),
        (dict(rope_scaling=RopeScaling(kind="linear", factor=0.5)), "rope_scaling.factor=0.5: the smallest is 1"),
        (dict(rope_scaling=RopeScaling(kind="llama3", low_freq_factor=4.0)), "low_freq_factor=4.0 must lie between"),
    ],
)
def test_a_decoder_that_means_nothing(changed: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_layout(ParallelConfig(), tiny_model(**changed), world_size=1)


@pytest.mark.parametrize(
    ("moe", "layout", "world", "says"),
    [
        (dict(), dict(expert=2), 2, "parallel.expert=2 spreads experts, and this model has none"),
        (dict(experts=4), dict(expert=3), 3, "not divide model.language.moe.experts=4; .*expert=1 or 2 or 4"),
        (dict(experts=4), dict(expert=2, pipeline=2), 2, "takes its ranks from the 1 of tensor x context x data"),
        (dict(experts=4, top_k=5), dict(), 1, "top_k=5 is not between 1 and model.language.moe.experts=4"),
        (dict(experts=4, top_k=1), dict(), 1, "norm_top_k=true gives the one expert"),
        (dict(experts=4, every=0), dict(), 1, "model.language.moe.every=0: the smallest is 1"),
        (dict(experts=4, ffn_hidden_size=9), dict(tensor=2), 2, "model.language.moe.ffn_hidden_size=9"),
        (dict(experts=4, shared_ffn_hidden_size=9), dict(tensor=2, expert=2), 2, "moe.shared_ffn_hidden_size=9"),
    ],
)
def test_experts_that_do_not_fit(moe: dict[str, int], layout: dict[str, int], world: int, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check_layout(ParallelConfig(**layout), tiny_model(moe=MoeConfig(**moe)), world_size=world)
    assert "\n" not in str(caught.value)


def test_whole_experts_need_not_be_cut() -> None:
    model = tiny_model(moe=MoeConfig(experts=4, ffn_hidden_size=9))
    check_layout(ParallelConfig(tensor=2, expert=2), model, world_size=2)


def test_rows_are_cut_evenly_under_sequence_parallelism() -> None:
    layout = ParallelConfig(tensor=2, sequence=True)
    with pytest.raises(UserError, match="data.pack.capacity=63; make it a multiple of 2"):
        check_layout(layout, tiny_model(), world_size=2, global_packs=8, capacity=63)
    check_layout(layout, tiny_model(), world_size=2, global_packs=8, capacity=64)
    layout = ParallelConfig(tensor=2, sequence=True, context=3)
    with pytest.raises(UserError, match=r"into 6 chunks and .* over 6 ranks, .*capacity=64; make it a multiple of 6$"):
        check_layout(layout, tiny_model(), world_size=6, global_packs=8, capacity=64)
    check_layout(layout, tiny_model(), world_size=6, global_packs=8, capacity=66)


@pytest.mark.parametrize(
    ("layout", "world", "packs", "says"),
    [
        (
            dict(),
            2,
            6,
            "is 3 packs a data-parallel rank, which data.micro_packs=2 does not divide; .* multiple of 4 or",
        ),
        (dict(), 3, 8, "make data.global_packs a multiple of 6"),
        (dict(pipeline=2, virtual=2), 2, 6, "micro-batches a data-parallel rank and has 3; .* a multiple of 4 or"),
    ],
)
def test_micro_batches_of_several_rows(layout: dict[str, int], world: int, packs: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_layout(ParallelConfig(**layout), tiny_model(), world_size=world, global_packs=packs, micro_packs=2)
    check_layout(ParallelConfig(**layout), tiny_model(), world_size=world, global_packs=12, micro_packs=2)


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        (dict(), 1),
        (dict(), 8),
        (dict(tensor=2), 4),
        (dict(tensor=4), 4),
        (dict(pipeline=2, virtual=2), 2),
        (dict(tensor=2, pipeline=4), 8),
    ],
)
def test_a_layout_that_fits(layout: dict[str, int], world: int) -> None:
    check_layout(ParallelConfig(**layout), tiny_model(), world_size=world, global_packs=8, capacity=64)
    check_layout(ParallelConfig(**layout), None, world_size=world)


# --- processes ----------------------------------------------------------------------------------------------------


def script(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\nrank = os.environ['RANK']\n{code}"]


def test_every_rank_gets_torchruns_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS VLM_NEMO_STARTED"
    code = f"open('{tmp_path}/' + rank, 'w').write(' '.join(os.environ[n] for n in '{names}'.split()))"
    assert local.launch(3, script(code)) == 0
    found = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [values[:5] for values in found] == [[str(r), str(r), "3", "3", "127.0.0.1"] for r in range(3)]
    assert len({tuple(values[5:]) for values in found}) == 1
    assert int(found[0][6]) == max(1, len(os.sched_getaffinity(0)) // 3)


def test_a_failing_ranks_code_is_the_commands_and_the_others_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.3)
    began = time.monotonic()
    assert local.launch(2, script("sys.exit(5) if rank == '1' else time.sleep(60)")) == 5
    ignores = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsys.exit(6) if rank == '1' else time.sleep(60)"
    assert local.launch(2, script(ignores)) == 6
    assert time.monotonic() - began < 20


def test_a_rank_that_a_signal_ended_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.3)
    assert local.launch(2, script("os.kill(os.getpid(), 9) if rank == '1' else time.sleep(60)")) == 137
    assert "rank 1 was ended by SIGKILL" in capfd.readouterr().err


def test_the_error_of_another_rank_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.3)
    code = "from vlm_nemo.cli import main\nsys.exit(main(['trian'])) if rank == '1' else time.sleep(60)"
    assert local.launch(2, script(code)) == 2
    assert capfd.readouterr().err == "error: no verb 'trian'; did you mean train?\n"
    assert local.launch(2, script("from vlm_nemo.cli import main\nsys.exit(main(['trian']))")) == 2
    assert capfd.readouterr().err == "error: no verb 'trian'; did you mean train?\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_reach_the_ranks_which_end_by_themselves(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        f"signal.signal({int(number)}, lambda *_: (open('{tmp_path}/got' + rank, 'a').write('x'), sys.exit(0)))\n"
        f"open('{tmp_path}/up' + rank, 'w')\ntime.sleep(60)"
    )
    start = f"import sys; from vlm_nemo.runtime.local import launch; sys.exit(launch(2, {script(code)!r}))"
    launcher = subprocess.Popen([sys.executable, "-c", start], cwd=ROOT)
    wait_for(tmp_path / "up0", tmp_path / "up1")
    launcher.send_signal(number)
    assert launcher.wait(20) == 0
    assert [(tmp_path / f"got{rank}").read_text() for rank in (0, 1)] == ["x", "x"]


def test_no_rank_outlives_the_launcher(tmp_path: Path) -> None:
    code = (
        f"open('{tmp_path}/' + rank, 'w').write(str(os.getpid()))\n"
        f"os.rename('{tmp_path}/' + rank, '{tmp_path}/up' + rank)\ntime.sleep(60)"
    )
    start = f"from vlm_nemo.runtime.local import launch; launch(2, {script(code)!r})"
    launcher = subprocess.Popen([sys.executable, "-c", start], cwd=ROOT)
    wait_for(tmp_path / "up0", tmp_path / "up1")
    launcher.kill()
    launcher.wait()
    pids = [int((tmp_path / f"up{rank}").read_text()) for rank in (0, 1)]
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_launch_script_refuses_before_it_starts_anything() -> None:
    result = run(LAUNCH, "3", "train", "recipe=shapes/stage1", "parallel.tensor=2")
    assert result.returncode == 2
    assert result.stderr == (
        "error: parallel.tensor=2 x parallel.pipeline=1 takes a multiple of 2 ranks, and 3 were started; "
        "change either number\n"
    )
    assert result.stdout == ""


@pytest.mark.parametrize("words", [(), ("2",), ("two", "train"), ("0", "train")])
def test_the_launch_script_says_how_it_is_used(words: tuple[str, ...]) -> None:
    result = run(LAUNCH, *words)
    assert result.returncode == 2
    assert result.stderr == "error: usage: launch/local.sh N VERB [key=value ...], with N processes\n"


def test_the_launch_script_answers_flags_once() -> None:
    assert run(LAUNCH, "2", "train", "recipe=shapes/stage1", "--validate").stdout == "ok\n"
    assert run(LAUNCH, "2", "train", "--help").stdout.count("vlm-nemo train:") == 1


def test_one_process_verbs_run_in_one_process() -> None:
    result = run(LAUNCH, "2", "prepare", "m.yaml", "out=o")
    assert (result.returncode, result.stderr) == (
        2,
        "error: prepare runs in one process, not 2; its option `workers` makes it use more\n",
    )


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_that_does_not_log_to_wandb_does_not_import_it() -> None:
    code = """
import sys
from vlm_nemo.cli import load
from vlm_nemo.verbs.table import VERBS
load(VERBS["train"])
assert "megatron.core.inference.contexts.dynamic_context" in sys.modules, "what imports it is there"
assert not [name for name in sys.modules if name.partition(".")[0] == "wandb"]
import wandb
assert callable(wandb.init)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
