#!/usr/bin/env bash
# Submit stages 1, 2 and 3; each starts when the one before it is done, from the checkpoint that its recipe names:
#   launch/pipeline.sh [sbatch options] [FAMILY] [key=value …]
# FAMILY (llava15_7b) is a folder of recipes with stage1, stage2 and stage3. A word of one stage only has its name before
# it: stage2:trainer.steps=100, stage3:--nodes=4. Options of sbatch are one word each: --time=8:00:00, not -t 8:00:00.
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export VLM_NEMO_HOME=$home

family=llava15_7b
all=()
for word in "$@"; do
    case $word in
        -* | *=* | stage[123]:*) all+=("$word") ;;
        *) family=$word ;;
    esac
done

# words_of STAGE: sets `options` (for sbatch) and `words` (for the stage).
words_of() {
    options=() words=("recipe=$family/stage$1")
    local word
    for word in ${all[@]+"${all[@]}"}; do
        case $word in
            stage"$1":*) word=${word#stage?:} ;;
            stage[123]:*) continue ;;
        esac
        case $word in
            -*) options+=("$word") ;;
            *) words+=("$word") ;;
        esac
    done
}

# Every stage's words before the first is submitted; the layout is checked by the job, which knows the ranks.
python=${VLM_NEMO_PYTHON:-$home/.venv/bin/python}
if [ -x "$(command -v "$python")" ]; then
    vlm=("$python" -m vlm_nemo)
elif command -v vlm-nemo >/dev/null; then
    vlm=(vlm-nemo)
else
    vlm=() # in a container only
fi
for stage in 1 2 3; do
    words_of "$stage"
    if [ ${#vlm[@]} -gt 0 ]; then
        "${vlm[@]}" train "${words[@]}" --cfg >/dev/null
    fi
done

jobs=()
trap '[ ${#jobs[@]} -eq 0 ] || scancel "${jobs[@]}"' ERR # half a chain is none
for stage in 1 2 3; do
    words_of "$stage"
    after=()
    if [ ${#jobs[@]} -gt 0 ]; then
        after=(--dependency="afterok:${jobs[-1]}" --kill-on-invalid-dep=yes)
    fi
    job=$(sbatch --parsable "${after[@]}" "${options[@]}" "$home/launch/stage$stage.sh" "${words[@]}")
    jobs+=("${job%%;*}")
    echo "stage $stage: job ${jobs[-1]}${after[0]:+, after job ${jobs[-2]}}"
done

ids=$(IFS=, && echo "${jobs[*]}")
printf '%s\n' "watch:   squeue --jobs=$ids" \
    "         tail -F slurm-${jobs[0]}-stage1.log" \
    "cancel:  scancel ${jobs[*]}   (a stage that does not end well cancels those after it)"
