#!/usr/bin/env bash
# The main job in small, on this machine's CPU: make data, train four stages, evaluate on scenes never seen, export,
# serve, ask.
# What is there already is used again; DEMO=short does a few steps of everything and promises no accuracy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=runs/demo
form=${DEMO:-full} # what is asked for; $out/form says what was made
export VLM_NEMO_PYTHON=${VLM_NEMO_PYTHON:-.venv/bin/python}
python=$VLM_NEMO_PYTHON
# Two data-parallel processes use two cores better than one process with two threads.
ranks=$(($(nproc) > 1 ? 2 : 1))

case $form in
    full) data=(images=32000) questions=200 train=() evaluate=() ;;
    short) data=(images=1600) questions=20 train=(trainer.steps=12 optim.warmup_steps=2) evaluate=(evaluate.limit=8) ;;
    *)
        echo "error: DEMO=$form is neither short nor full" >&2
        exit 2
        ;;
esac
mkdir -p "$out"
found=$(cat "$out/form" 2>/dev/null || echo "$form")
if [ "$found" = short ] && [ "$form" = full ]; then
    echo "the short demo's results make room for the full one"
    rm -rf "$out"/{raw,shards,stage0,stage1,stage2,stage3,eval,export,summary.json}
elif [ "$found" = full ] && [ "$form" = short ]; then
    if [ ! -f "$out/summary.json" ]; then
        echo "error: $out holds an unfinished full demo; 'make demo' goes on with it, or move it away for DEMO=short" >&2
        exit 2
    fi
    echo "the full demo is there"
    form=full
fi
echo "$form" >"$out/form"

say() { printf '\n== %s\n' "$*"; }

# A run is complete when its run.json says that the last step was done.
complete() { [ -f "$1/run.json" ] && "$python" -c 'import json, sys; r = json.load(open(sys.argv[1])); sys.exit(r["step"] < r["steps"])' "$1/run.json"; }

if [ ! -f "$out/raw/done" ]; then
    say "pictures and texts -> $out/raw"
    "$python" data/shapes/prepare.py out="$out/raw" "${data[@]}" questions="$questions"
    touch "$out/raw/done"
fi
say "shards -> $out/shards"
"$python" -m vlm_nemo prepare data/shapes/manifest.yaml root="$out/raw" out="$out/shards" tokenizer_vocab=512 \
    template=short image_size=64 patch_size=16 capacity=1280

for stage in 0 1 2 3; do
    if complete "$out/stage$stage"; then
        say "stage $stage is there already -> $out/stage$stage"
        continue
    fi
    say "stage $stage -> $out/stage$stage"
    rm -rf "$out/eval" "$out/export" "$out/summary.json"
    launch/local.sh "$ranks" train recipe="shapes/stage$stage" run_dir="$out/stage$stage" ${train[@]+"${train[@]}"}
done

if [ ! -f "$out/eval/scores.json" ]; then
    say "questions about scenes never seen -> $out/eval"
    launch/local.sh "$ranks" evaluate recipe=shapes/stage3 checkpoint="$out/stage3/checkpoints" run_dir="$out/eval" \
        ${evaluate[@]+"${evaluate[@]}"}
fi

"$python" - "$out" <<'PYTHON'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
summary = json.loads((out / "eval/scores.json").read_text())
stages = sorted(path.parent.name for path in out.glob("stage*/run.json"))
summary["seconds"] = {stage: json.loads((out / stage / "run.json").read_text())["seconds"] for stage in stages}
(out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
PYTHON

if [ ! -f "$out/export/manifest.json" ]; then
    say "export -> $out/export"
    rm -rf "$out/export"
    "$python" -m vlm_nemo export checkpoint="$out/stage3/checkpoints" out="$out/export" precision=fp32
fi

say "a server on $out/export, asked by the openai client about pictures never seen"
"$python" data/shapes/ask.py export="$out/export" raw="$out/raw"

say "done; look at"
printf '  %s\n' "$out/eval/gallery.html   unseen pictures, questions, answers, truths" \
    "$out/eval/contact.png    the same as one picture" \
    "$out/stage3/loss.png     how the loss fell" \
    "$out/summary.json        accuracy by kind, with swapped pictures, by chance; seconds a stage" \
    "$out/export              ONNX graphs; a page to ask it: vlm-nemo serve export=$out/export" \
    "$out/stage3/checkpoints  the model: vlm-nemo generate checkpoint=$out/stage3/checkpoints image=PICTURE prompt=…"
