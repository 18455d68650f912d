"""The table of verbs. Light: help and the command line read it before anything heavy is imported.

A new verb is a row here, a root dataclass in config.py, a conf/<verb>.yaml, and the function that the row names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vlm_nemo import config
from vlm_nemo.data.config import PrepareConfig
from vlm_nemo.export.config import ExportConfig
from vlm_nemo.train.config import CheckpointsConfig


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One thing that `vlm-nemo` does."""

    name: str
    summary: str
    examples: tuple[str, str]
    root: type
    run: str
    """module:function, called with the composed root object."""
    required: tuple[str, ...] = ()
    """Keys that need a value in this verb, beyond those that the dataclasses demand."""
    model: tuple[str, ...] = ()
    """Keys of which the command line itself has to name one, and only one: the model that is asked. (A recipe's
    checkpoint.load is where its training starts from.)"""
    positional: tuple[str, ...] = ()
    """The keys that bare words set, one after the other."""
    recipes: bool = False
    """Takes `recipe=NAME`."""
    ranks: bool = True
    """Several processes work together; otherwise it runs in one."""
    notes: tuple[str, ...] = field(default=())
    """More lines for the help."""


CHECKPOINT_NOTE = "checkpoint=DIR is short for checkpoint.load=DIR"

VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb(
            name="prepare",
            summary="turn raw images and texts into indexed WebDataset shards",
            examples=(
                "vlm-nemo prepare data/cc3m/manifest.yaml root=cc3m_raw out=shards/cc3m tokenizer=DIR template=plain",
                "vlm-nemo prepare my/manifest.yaml out=shards/my workers=16 tokenizer_vocab=32000 audit=true",
            ),
            root=PrepareConfig,
            run="vlm_nemo.data.prepare.run:prepare",
            positional=("manifest",),
            ranks=False,
            notes=(
                "a path without a key is the manifest; the same command again goes on, and keeps what is done",
                "another tokenizer= or template= adds its lengths to what is prepared; audit=true looks at it",
            ),
        ),
        Verb(
            name="train",
            summary="train a model, or go on with a run that was stopped",
            examples=(
                "vlm-nemo train recipe=shapes/stage1 trainer.steps=50",
                "launch/local.sh 2 train recipe=shapes/stage2 parallel.tensor=2 run_dir=runs/two",
            ),
            root=config.Config,
            run="vlm_nemo.verbs.train:train",
            required=("data.sources", "data.tokenizer"),
            recipes=True,
            notes=(CHECKPOINT_NOTE,),
        ),
        Verb(
            name="check",
            summary="rehearse a training run before it meets a cluster: memory, layouts, leaks, data, one step",
            examples=(
                "vlm-nemo check recipe=llava15_7b/stage2 check.world=32 parallel.tensor=4 parallel.sequence=true",
                "vlm-nemo check recipe=shapes/stage2 check.parts=[parity,leaks]",
            ),
            root=config.CheckRoot,
            run="vlm_nemo.verbs.check:check",
            recipes=True,
            ranks=False,
            notes=(
                "takes the words of train; starts small processes of its own on the CPU, and needs no GPU",
                "fails (exit code 2) where a part does; what there is no data for is skipped and said",
            ),
        ),
        Verb(
            name="checkpoint",
            summary="list a run's checkpoints, verify every byte of them, remove the old ones",
            examples=(
                "vlm-nemo checkpoint list runs/demo/stage1",
                "vlm-nemo checkpoint prune runs/llava15_7b/stage2 keep=3 every=1000 yes=true",
            ),
            root=CheckpointsConfig,
            run="vlm_nemo.verbs.checkpoint:checkpoint",
            positional=("action", "dir"),
            ranks=False,
            notes=(
                "the words without a key are action and dir; needs neither torch nor a GPU",
                "exit code 2 where a checkpoint is damaged (verify) or none is intact (prune)",
            ),
        ),
        Verb(
            name="evaluate",
            summary="ask a trained model held-out questions and write scores and a gallery",
            examples=(
                "vlm-nemo evaluate recipe=shapes/stage3 checkpoint=runs/demo/stage3/checkpoints",
                "launch/local.sh 2 evaluate recipe=shapes/stage3 checkpoint=runs/two/checkpoints evaluate.limit=20",
            ),
            root=config.Config,
            run="vlm_nemo.verbs.evaluate:evaluate",
            required=("evaluate.data",),
            model=("checkpoint.load", "evaluate.hf", "evaluate.export"),
            recipes=True,
            notes=(CHECKPOINT_NOTE, "the model's own settings come from the checkpoint"),
        ),
        Verb(
            name="generate",
            summary="answer a question about images",
            examples=(
                'vlm-nemo generate checkpoint=runs/demo/stage3/checkpoints image=cat.jpg prompt="What is this?"',
                'vlm-nemo generate checkpoint=DIR image=[a.jpg,b.jpg] prompt="What differs?" infer.max_new_tokens=20',
            ),
            root=config.GenerateRoot,
            run="vlm_nemo.verbs.generate:generate",
            required=("prompt",),
            model=("checkpoint.load", "hf", "export"),
            notes=(CHECKPOINT_NOTE, "the model's own settings come from the checkpoint"),
        ),
        Verb(
            name="convert",
            summary="bring a model from Hugging Face, or give one back",
            examples=(
                "vlm-nemo convert hf=[clip-vit-large-patch14-336,vicuna-7b] out=runs/llava15_7b/start",
                "vlm-nemo convert checkpoint=runs/demo/stage3/checkpoints out=runs/demo/hf",
            ),
            root=config.ConvertRoot,
            run="vlm_nemo.verbs.convert:convert",
            model=("checkpoint.load", "hf"),
            ranks=False,
            notes=(
                CHECKPOINT_NOTE,
                "safetensors in and out; to and from one layout: any layout loads what it writes",
            ),
        ),
        Verb(
            name="export",
            summary="write ONNX graphs, and engines compiled from them, that answer without torch",
            examples=(
                "vlm-nemo export checkpoint=runs/demo/stage3/checkpoints out=runs/demo/export precision=fp32",
                "vlm-nemo export hf=llava-1.5-7b-hf out=export engine=tensorrt_rtx engine_sm=[89,120]",
            ),
            root=ExportConfig,
            run="vlm_nemo.verbs.export:export",
            model=("checkpoint.load", "hf"),
            ranks=False,
            notes=(CHECKPOINT_NOTE, "the graphs are compared with the model in torch; over a limit, the export fails"),
        ),
        Verb(
            name="serve",
            summary="answer over HTTP as OpenAI's API does, and show a page to ask",
            examples=(
                "vlm-nemo serve export=runs/demo/export",
                "launch/local.sh 2 serve checkpoint=runs/two/checkpoints parallel.tensor=2 serve.port=9000",
            ),
            root=config.ServeRoot,
            run="vlm_nemo.verbs.serve:serve",
            model=("checkpoint.load", "hf", "export"),
            notes=(
                CHECKPOINT_NOTE,
                "asks everybody for an API key if the variable VLM_NEMO_API_KEY is set",
            ),
        ),
    )
}
