"""What can be set, what is refused, and with which words."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vlm_nemo import config
from vlm_nemo.config import CheckRoot, Config, ServeRoot, build, compose
from vlm_nemo.data import chat
from vlm_nemo.data.config import TEMPLATES, PrepareConfig
from vlm_nemo.help import of_verb
from vlm_nemo.options import ANY_NAME, Option, find, nearest, options, sections
from vlm_nemo.overrides import translate
from vlm_nemo.parts import check_own_names, group_choices, home, part_folders
from vlm_nemo.types import UserError
from vlm_nemo.verbs.table import VERBS

ROOT = Path(__file__).parent.parent


def composed(*words: str, verb: str = "train") -> Config:
    """The object that a command line makes."""
    row = VERBS[verb]
    asked = translate(words, row.root, recipes=row.recipes, positional=row.positional)
    return build(compose(verb, row.root, asked.overrides, asked.recipe), row.root)


def error_of(*words: str, verb: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        composed(*words, verb=verb)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_names_of_templates_are_those_that_there_are() -> None:
    assert TEMPLATES == tuple(chat.TEMPLATES)


def test_groups_and_modules_are_a_bijection() -> None:
    folders = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert folders == set(config.GROUPS)
    assert len(set(config.GROUPS.values())) == len(config.GROUPS)
    for group, module in config.GROUPS.items():
        assert importlib.util.find_spec(module) is not None, f"conf/{group} configures {module}, which does not exist"
        assert list((ROOT / "conf" / group).glob("*.yaml")), f"conf/{group} is empty"


def test_every_group_is_a_section_of_a_root_and_names_its_module() -> None:
    titles = {s.key: s.title for root in (CheckRoot, ServeRoot) for s in sections(root) if s.key in config.GROUPS}
    assert set(titles) == set(config.GROUPS)
    for group, module in config.GROUPS.items():
        assert f"`{module}`" in titles[group], f"{group} says {titles[group]!r}"


def test_one_primary_yaml_a_verb() -> None:
    assert {path.stem for path in (ROOT / "conf").glob("*.yaml")} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_description(verb: str) -> None:
    assert [key for key, option in options(VERBS[verb].root).items() if not option.doc] == []


@pytest.mark.parametrize("group", config.GROUPS)
def test_every_part_composes(group: str) -> None:
    verb = {"infer": "generate", "serve": "serve", "check": "check"}.get(group, "train")
    for choice in group_choices(group):
        composed(f"{group}={choice}", verb=verb)


def test_a_list_of_choices_is_checked() -> None:
    assert composed("check.parts=[data,dry]", verb="check").check.parts == ["data", "dry"]  # type: ignore[attr-defined]
    line = "check.parts must be a list of plan, parity, leaks, data, dry, not ['data', 'leak']; did you mean leaks?"
    assert error_of("check.parts=[data,leak]", verb="check") == line
    option = find("check.parts", options(CheckRoot))
    assert option is not None and option.type_name == "[plan | parity | leaks | data | dry, …]"


def test_lists_in_lists_have_a_name() -> None:
    option = find("model.layout.pinpoints", options(Config))
    assert option is not None and option.type_name == "[[int, …], …]"


def test_a_part_fills_its_section() -> None:
    assert composed("model=tiny").model.vision.image_size == 64
    large = composed("model=llava15_13b").model
    assert (large.language.hidden_size, large.vision.hidden_size) == (5120, 1024)


def test_the_command_line_beats_the_recipe_beats_the_parts() -> None:
    cfg = composed("recipe=shapes/stage1", "trainer.steps=7", "parallel.tensor=2")
    assert (cfg.trainer.steps, cfg.parallel.tensor, cfg.model.vision.image_size) == (7, 2, 64)
    assert cfg.recipe == "shapes/stage1"
    assert cfg.run_dir == "runs/shapes/stage1"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("trainer.stepz=5", "no option trainer.stepz; did you mean trainer.steps?"),
        ("trainr.steps=5", "no option trainr.steps; did you mean trainer.steps?"),
        ("steps=5", "no option steps; did you mean trainer.steps?"),
        ("model.tensor=2", "no option model.tensor; did you mean parallel.tensor?"),
        ("data.sources.mine.weigth=1", "no option data.sources.mine.weigth; did you mean data.sources.mine.weight?"),
        ("nothinglikeit=5", "no option nothinglikeit"),
        ("model=tiyn", "model=tiyn: conf/model has no 'tiyn'; did you mean tiny?"),
        ("trainer.steps=abc", "trainer.steps must be an integer, not 'abc'"),
        ("trainer.steps=1.5", "trainer.steps must be an integer, not 1.5"),
        ("trainer.steps=true", "trainer.steps must be an integer, not True"),
        ("trainer.steps=null", "trainer.steps must be an integer, not null"),
        ("trainer.steps=", "trainer.steps must be an integer, not ''"),
        ("trainer.steps=1,2", "trainer.steps must be an integer, not '1,2'"),
        ("trainer.steps=1(", "trainer.steps must be an integer, not '1('"),
        ("optim.vision_lr=fast", "optim.vision_lr must be a number or null, not 'fast'"),
        ("parallel.sequence=2.5", "parallel.sequence must be true or false, not 2.5"),
        ("model.vision.mean=3", "model.vision.mean must be a list: [a number, …], not 3"),
        ("data.sources.mine.weight=x", "data.sources.mine.weight must be a number or null, not 'x'"),
        ("precision=fp16", "precision must be one of fp32, bf16, not 'fp16'; did you mean bf16?"),
        ("model.layout.aspect=pda", "model.layout.aspect must be one of pad, crop, squash, not 'pda'"),
        ("data.template=qwn", "data.template must be one of vicuna, plain, "),
        ("parallel.recompute=half", "parallel.recompute must be one of none, selective, full, not 'half'"),
        ("log.wandb_mode=offlin", "log.wandb_mode must be one of offline, online, disabled, not 'offlin'"),
        ("run_dir=runs/${nowhere}", "run_dir: Interpolation key 'nowhere' not found"),
        ("recipe=shapes/stge1", "no recipe 'shapes/stge1'; did you mean shapes/stage1?"),
        ("stage1", "cannot read 'stage1': expected key=value"),
        ("data.sources.a/b.weight=1", "cannot read"),
        ("~trainer.steps", "cannot remove trainer.steps"),
    ],
)
def test_a_wrong_word_fails_with_full_key_and_what_to_do(word: str, says: str) -> None:
    assert error_of(word).startswith(says)


def test_a_required_key_is_named() -> None:
    assert error_of("some/manifest.yaml", verb="prepare").startswith("out is not set: Folder to write")
    assert error_of("data.sources.a.weight=2").startswith("data.sources.a.path is not set")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("trainer: {stepz: 3}", "no option trainer.stepz; did you mean trainer.steps? (in recipe {path})"),
        ("trainer: {steps: x}", "trainer.steps must be an integer, not 'x' (in recipe {path})"),
        ("trainer: {steps: [3", "{path}, line 3: "),
        ("precision: fp8", "precision must be one of fp32, bf16, not 'fp8'"),
        ("defaults: [{override /model: tinny}]", "In 'train': Could not find 'model/tinny'"),
    ],
)
def test_a_wrong_recipe_file_is_named(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"# @package _global_\n{content}\n")
    assert error_of(f"recipe={path}").startswith(says.format(path=path))


def test_a_recipe_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes" / "my own").mkdir(parents=True)
    (tmp_path / "recipes" / "my own" / "one.yaml").write_text(
        "# @package _global_\ndefaults: [/recipes/shapes/_base, _self_]\ntrainer: {steps: 3}\n"
    )
    (tmp_path / "recipes" / "bare.yaml").write_text("trainer: {steps: 3}\n")
    monkeypatch.chdir(tmp_path)
    for name in ("my own/one", "recipes/my own/one.yaml", f"{tmp_path}/recipes/my own/one.yaml"):
        cfg = composed(f"recipe={name}")
        assert (cfg.recipe, cfg.trainer.steps, cfg.model.vision.image_size) == ("my own/one", 3, 64)
    assert composed("recipe=shapes/stage1").recipe == "shapes/stage1"
    assert error_of("recipe=bare") == "recipe bare lacks its first line: # @package _global_"


def test_a_part_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("defaults: [tiny, _self_]\nlanguage: {num_layers: 6}\n")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.yaml").write_text(
        "# @package _global_\ndefaults:\n- override /model: mine\ntrainer: {steps: 3}\n"
    )
    (tmp_path / "out").mkdir()  # no group of Hydra's, though it lies beside recipes/
    monkeypatch.chdir(tmp_path)
    assert {"mine", "tiny"} <= set(group_choices("model"))
    assert "llava_onevision_7b, mine, ovis2_1b" in " ".join(of_verb(VERBS["train"]).split())
    for words in (["model=mine"], ["recipe=one"], ["recipe=shapes/stage1", "model=mine"]):
        model = composed(*words).model
        assert (model.language.num_layers, model.vision.image_size) == (6, 64)
    assert error_of("model=mien") == "model=mien: conf/model has no 'mien'; did you mean mine?"
    assert composed("m.yaml", "out=out", verb="prepare").out == "out"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("language: {num_layer: 6}", "did you mean model.language.num_layers? (in conf/model/mine.yaml)"),
        ("language: {num_layers: six}", "must be an integer, not 'six' (in conf/model/mine.yaml)"),
        ("language: [", "conf/model/mine.yaml, line 2: expected the node content"),
        ("defaults: [nowhere]", "In 'model/mine': Could not load 'model/nowhere'"),
        ("defaults: [mine, _self_]", "the `defaults` of a part or a recipe lead back to itself"),
    ],
)
def test_a_wrong_part_of_the_current_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, says: str
) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(content + "\n")
    monkeypatch.chdir(tmp_path)
    assert says in error_of("model=mine")
    assert composed("model=tiny").model.language.num_layers == 4


def test_a_part_with_one_of_our_names_is_refused_where_it_would_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, own = home() / "conf", tmp_path / "conf"
    for name in ("model/tiny", "optim/default"):
        (own / name).parent.mkdir(parents=True)
        (own / f"{name}.yaml").write_bytes((ours / f"{name}.yaml").read_bytes())
    (own / "model" / "mine.yaml").write_text("defaults: [tiny, _self_]\n")
    monkeypatch.chdir(tmp_path)
    assert composed("model=mine").model.init_std == 0.06  # copies say the same
    with (own / "model" / "tiny.yaml").open("a") as file:
        file.write("init_std: 0.5\n")
    says = f"{own}/model/tiny.yaml has the name of {ours}/model/tiny.yaml, which is read instead; give it another name"
    assert error_of("recipe=shapes/stage1").startswith(says)
    assert error_of("model=mine").startswith(says)
    check_own_names("train", {"model": "llava15_13b", "optim": "default", "recipes": None})
    (own / "optim" / "default.yaml").write_text("lr: 3\n")
    assert error_of("model=llava15_7b").startswith(f"{own}/optim/default.yaml has the name of")
    assert composed("optim=llava15").model.init_std == 0.02  # what is not in use is not read
    (own / "train.yaml").write_text("seed: 3\n")
    assert "put what it says into recipes/NAME.yaml" in error_of("optim=llava15")
    assert composed("prompt=x", verb="generate").prompt == "x"  # type: ignore[attr-defined]


def test_in_the_checkout_nothing_is_looked_up_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home())
    assert part_folders() == [home() / "conf"]
    check_own_names("train", {"model": "llava15_13b"})


def test_a_folder_named_as_an_option_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("conf/model", "conf/export"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    line = "export is an option, and a folder of that name beside recipes/ or in conf/ hides it; rename the folder"
    assert error_of("export=x", "prompt=y", verb="generate") == line


@pytest.mark.parametrize(
    "text",
    [
        "What is this?",
        "It's \"it\", isn't it? {a: [1, 2]} (x=y) #1 100% ~/ ${HOME} $x @ & | ; !",
        "back\\slash \\' \\\\' end\\",
        "two\nlines",
        "  spaces  ",
        "null",
        "3",
        "日本語 ✓",
        "'quoted'",
        "a=b=c",
        "\\\\${HOME} \\${x} $${y} ${",
    ],
)
def test_text_arrives_as_typed(text: str) -> None:
    cfg = composed(f"prompt={text}", "checkpoint=c", f"image={text}", verb="generate")
    assert (cfg.prompt, cfg.image) == (text, [text])


def test_shorthands() -> None:
    assert composed("checkpoint=runs/a b/step_1").checkpoint.load == "runs/a b/step_1"
    assert composed("checkpoint=null").checkpoint.load is None
    assert composed("checkpoint=default").checkpoint.load is None
    assert composed("a/manifest.yaml", "out=o", verb="prepare").manifest == "a/manifest.yaml"
    assert composed("image=[a.jpg,'b c.jpg']", verb="generate").image == ["a.jpg", "b c.jpg"]


def test_named_members() -> None:
    cfg = composed("recipe=shapes/stage3", "data.sources.my-own.weight=2", "data.sources.my-own.path=a, (b)")
    assert set(cfg.data.sources) == {"captions", "instruct", "relations", "my-own"}
    assert (cfg.data.sources["my-own"].path, cfg.data.sources["my-own"].weight) == ("a, (b)", 2.0)
    assert set(composed("recipe=shapes/stage3", "~data.sources.captions").data.sources) == {"instruct", "relations"}
    assert composed("model.megatron.qk_layernorm=true").model.megatron == {"qk_layernorm": True}
    assert composed("data.sources={a:{path:x}}").data.sources["a"].path == "x"


def test_references_resolve() -> None:
    cfg = composed("run_dir=runs/${recipe}/${seed}", "optim.lr=3e-4", "optim.language_lr=${optim.lr}", "seed=5")
    assert (cfg.run_dir, cfg.optim.language_lr) == ("runs/default/5", 3e-4)


def test_now_is_the_same_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    word = "run_dir=runs/${now:%Y-%m-%d}"
    assert composed(word).run_dir == time.strftime("runs/%Y-%m-%d")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "differs from rank to rank" in error_of(word)
    monkeypatch.setenv("VLM_NEMO_STARTED", "86400")
    assert composed("run_dir=${now:%Y}").run_dir == "1970"


@dataclass(kw_only=True)
class Inner:
    """Inside."""

    depth: int | None = None
    """How deep."""
    bare: float = 0.5


@dataclass(kw_only=True)
class Outer:
    """Outside.

    More words.
    """

    inner: Inner = field(default_factory=Inner)
    many: dict[str, Inner] = field(default_factory=dict)
    """Several,
    on two lines."""
    kind: str = field(default="a", metadata={"choices": ("a", "b")})
    """Which."""


def test_options_are_read_from_the_source() -> None:
    known = options(Outer)
    assert list(known) == [
        "many",
        "kind",
        "inner.depth",
        "inner.bare",
        f"many.{ANY_NAME}.depth",
        f"many.{ANY_NAME}.bare",
    ]
    assert known["many"].doc == "Several, on two lines."
    assert known["inner.bare"].doc == ""
    assert (known["inner.depth"].type_name, known["inner.depth"].expected) == ("int | null", "an integer or null")
    assert (known["kind"].type_name, known["kind"].expected) == ("a | b", "one of a, b")
    assert [section.title for section in sections(Outer)] == ["Outside.", "Inside.", "Inside."]


def test_find_takes_any_name() -> None:
    known: dict[str, Option] = options(PrepareConfig)
    assert find("out", known) is known["out"]
    assert find("out.x", known) is None
    found = find("many.mine.depth", options(Outer))
    assert found is not None and found.key == f"many.{ANY_NAME}.depth"


def test_nearest_prefers_the_whole_key() -> None:
    assert nearest("evaluate.max_tokens", ["infer.max_tokenz", "evaluate.max_new_tokens"]) == "evaluate.max_new_tokens"
    assert nearest("zzz", ["abc"]) is None
    assert nearest("abc", []) is None
