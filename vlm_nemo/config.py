"""The roots: what each verb can be told, and how conf/, a recipe and the command line become one typed object.

The roots only list the parts; each part is a dataclass beside the code that it configures. Nobody below imports this.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from omegaconf import MISSING

from vlm_nemo.check.config import CheckConfig
from vlm_nemo.data.config import TEMPLATES, DataConfig
from vlm_nemo.evaluate.config import EvaluateConfig
from vlm_nemo.explain import check_choices, explain, missing
from vlm_nemo.infer.config import InferConfig
from vlm_nemo.model.config import ModelConfig
from vlm_nemo.options import did_you_mean
from vlm_nemo.parts import check_own_names, home, part_folders, recipe_folders, recipe_names
from vlm_nemo.runtime.config import ParallelConfig
from vlm_nemo.serve.config import ServeConfig
from vlm_nemo.train.config import CheckpointConfig, LogConfig, OptimConfig, TrainerConfig
from vlm_nemo.types import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

Root = TypeVar("Root")

PRECISIONS = ("fp32", "bf16")

GROUPS: dict[str, str] = {
    "model": "vlm_nemo.model.vlm",
    "data": "vlm_nemo.data.loader",
    "parallel": "vlm_nemo.runtime.groups",
    "optim": "vlm_nemo.train.optim",
    "trainer": "vlm_nemo.train.trainer",
    "checkpoint": "vlm_nemo.train.checkpoint",
    "log": "vlm_nemo.train.metrics",
    "evaluate": "vlm_nemo.evaluate.vqa",
    "infer": "vlm_nemo.infer.engine",
    "serve": "vlm_nemo.serve.app",
    "check": "vlm_nemo.check.report",
}
"""Folder of conf/ -> the module that it configures: one to one."""


@dataclass(kw_only=True)
class Config:
    """A training run, and the evaluation of what it made."""

    run_dir: str = "runs/${recipe}"
    """Folder that takes everything the run writes."""
    recipe: str = "default"
    """Name of a complete run in recipes/; the other words change it."""
    precision: str = field(default="bf16", metadata={"choices": PRECISIONS})
    """Type of weights and activations in the forward and backward pass; the optimizer's own are fp32."""
    seed: int = 1234
    """Of everything random: weights, data order."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass(kw_only=True)
class CheckRoot(Config):
    """A training run, rehearsed."""

    check: CheckConfig = field(default_factory=CheckConfig)


@dataclass(kw_only=True)
class GenerateRoot:
    """A question to a trained model."""

    prompt: str = field(default="", metadata={"literal": True})
    """What to ask. Each image stands where `<image>` does; without any marker the images come first."""
    image: list[str] = field(default_factory=list, metadata={"literal": True})
    """A file, or [a.jpg,b.jpg] for several; none = text only."""
    hf: str | None = None
    """A Hugging Face folder to ask, instead of a checkpoint."""
    export: str | None = None
    """An export bundle to ask, instead of a checkpoint."""
    precision: str = field(default="auto", metadata={"choices": ("auto", *PRECISIONS)})
    """Type of weights and activations; auto = as the checkpoint was trained."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    infer: InferConfig = field(default_factory=InferConfig)


@dataclass(kw_only=True)
class ConvertRoot:
    """Hugging Face's folders to a checkpoint of ours, and back: one of `hf` and `checkpoint`."""

    hf: list[str] = field(default_factory=list)
    """Folder to read: a whole model of any family, a tower, a decoder; or [CLIP,LLAMA], each giving what it has."""
    out: str = MISSING
    """Folder to write; new or empty."""
    part: str = field(default="all", metadata={"choices": ("all", "vision", "language")})
    """From a checkpoint: the whole model, the tower (as CLIPVisionModel, …) or the decoder (as LlamaForCausalLM, …)
    alone."""
    dtype: str = field(default="keep", metadata={"choices": ("keep", "float32", "bfloat16", "float16")})
    """Type of the weights written; keep = each as it is, to the bit."""
    max_shard_gb: float = 2.0
    """Largest file of weights, 10^9 bytes; about this much memory is needed."""
    feature_layer: int | None = None
    """The hidden state to take from a tower that stands alone; null = -2 of CLIP and SigLIP, -1 of others. A whole
    model says it itself."""
    template: str = field(default="auto", metadata={"choices": ("auto", *TEMPLATES)})
    """How a conversation becomes text, written into the checkpoint; auto = the one that the folder's chat template is,
    else the family's, else the one whose special tokens the tokenizer has."""
    parity: bool = False
    """Ask both models about the same image, in fp32: prints and writes to out/parity.json how far the logits are apart.
    Needs transformers, and memory for the whole model."""
    image: str | None = field(default=None, metadata={"literal": True})
    """Of parity: a picture's file; null = a drawn one."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(kw_only=True)
class ServeRoot:
    """A model behind HTTP."""

    export: str | None = None
    """Bundle that `vlm-nemo export` wrote; needs neither torch nor megatron-core."""
    hf: str | None = None
    """Folder of Hugging Face's files."""
    precision: str = field(default="auto", metadata={"choices": ("auto", *PRECISIONS)})
    """Type of weights and activations; auto = as the model was trained or exported."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    infer: InferConfig = field(default_factory=InferConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)


def compose(verb: str, root: type[Root], overrides: Sequence[str] = (), recipe: str | None = None) -> DictConfig:
    """conf/<verb>.yaml, then the recipe, then Hydra overrides; typed by `root`.

    Raises UserError: one line that names the full key and the nearest one, or the value and what it should be.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    ConfigStore.instance().store(name=f"{verb}_schema", node=root)
    try:
        words = [*_search_path(recipe), *_recipe_overrides(recipe), *overrides]
        with initialize_config_dir(config_dir=str(home() / "conf"), version_base="1.3"):
            # Hydra's own `now` is a clock: it would give every rank a run folder of its own.
            OmegaConf.register_new_resolver("now", _now, replace=True)
            config = hydra_compose(verb, overrides=words, return_hydra_config=True)
        check_own_names(verb, config.hydra.runtime.choices)
        with open_dict(config):
            del config["hydra"]
        resolved = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, RecursionError) as error:
        raise UserError(explain(error, root, recipe, GROUPS)) from None
    check_choices(resolved, root)
    return config


def build(config: DictConfig, root: type[Root]) -> Root:
    """The composed config as an object of the root's dataclasses. Raises UserError where a required key is not set."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue

    try:
        built = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise UserError(missing(str(error.full_key), root)) from None
    assert isinstance(built, root)
    return built


def _search_path(recipe: str | None) -> Iterator[str]:
    """The Hydra word that says where else recipes/NAME.yaml and GROUP/NAME.yaml are looked up, after our conf/."""
    # Hydra looks for recipes/NAME.yaml beside each recipes/ folder; the first that has it wins. Not without a recipe:
    # any folder there is a group to Hydra, and `out=…` would select from ./out.
    folders = [folder.parent for folder in recipe_folders()] if recipe is not None else []
    folders += [folder for folder in part_folders()[1:] if any((folder / group).is_dir() for group in GROUPS)]
    if folders:
        yield f"hydra.searchpath=[{','.join(quote(f'file://{folder}') for folder in folders)}]"


def _recipe_overrides(recipe: str | None) -> Iterator[str]:
    """The Hydra words that select a recipe by its name in a recipes/ folder, or by the path of a file."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    if recipe is None:
        return
    folders, names, file = recipe_folders(), recipe_names(), Path(recipe).resolve()
    name = recipe.removesuffix(".yaml")
    for folder in folders:
        if file.is_file() and file.is_relative_to(folder.resolve()):
            name = file.relative_to(folder.resolve()).with_suffix("").as_posix()
    if name in names:
        yield f"recipes={name}"
    elif file.suffix == ".yaml" and file.is_file():
        ConfigStore.instance().store(group="recipes", name="file", node=OmegaConf.load(file), package="_global_")
        yield "recipes=file"
        name = file.stem
    else:
        raise UserError(f"no recipe {recipe!r}{did_you_mean(name, names) or '; there are ' + ', '.join(names)}")
    yield f"recipe={quote(name)}"


def _now(pattern: str) -> str:
    """`${now:…}`: the time at which the run was started, the same on every rank."""
    started = os.environ.get("VLM_NEMO_STARTED")
    if started is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "${now:} differs from rank to rank; start with launch/local.sh, or set VLM_NEMO_STARTED to one time "
            "(seconds since 1970) for all ranks, or name the folder"
        )
    return time.strftime(pattern, time.localtime(float(started) if started else None))


def quote(text: str) -> str:
    """`text` as one single-quoted string of Hydra's grammar.

    Only backslashes before a quote (also the closing one) are escapes there; the others stand for themselves.
    """
    escaped = re.sub(r"(\\*)'", lambda m: m[1] * 2 + r"\'", text)
    return "'" + re.sub(r"(\\+)$", lambda m: m[1] * 2, escaped) + "'"
