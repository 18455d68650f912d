# shellcheck shell=bash
# What the Slurm jobs share: launch/stageN.sh source it and call run_stage. How processes start and how a job goes on,
# nothing about training.
#
#   the stage's recipe is llava15_7b/stageN unless a word says recipe=…; every word goes to `vlm-nemo train`
#   a word that is wrong            one line, exit code 2, before anything starts; never requeued
#   the time limit comes near       Slurm sends USR2 (--signal): all ranks finish their step, save and end; requeued
#   a rank or a node dies           requeued, from the newest checkpoint; see VLM_NEMO_MAX_RESTARTS
#   scancel                         saved if KillWait allows it; never requeued
#   the last step is done           exit code 0, which a job that depends on this one waits for (launch/pipeline.sh)
#   it ended before, unasked        exit code 3 (trainer.stop_at, SIGTERM to the ranks): the next stage must not start
#
# Environment, all optional; sbatch passes the submitting shell's on:
#   VLM_NEMO_PYTHON          the interpreter; else .venv/bin/python of the project's folder, else vlm-nemo on PATH
#   VLM_NEMO_HOME            the project's folder, where it is not the one that the job was submitted from
#   VLM_NEMO_MAX_RESTARTS    how often a failure without a new checkpoint in between is tried again (3)
#   VLM_NEMO_CONTAINER       an image for pyxis (--container-image); vlm-nemo inside it is used
#   VLM_NEMO_MOUNTS          mounts of the container besides the current folder: /data:/data,…
#   VLM_NEMO_SRUN            more words for srun, split at spaces: --cpu-bind=none
#   VLM_NEMO_STARTED         the time that ${now:…} in a configuration means, seconds since 1970
#   MASTER_PORT              where rank 0 listens (20000 + the job's number mod 10000)
#   OMP_NUM_THREADS          threads a rank (--cpus-per-task); NCCL_*, GLOO_*, CUDA_* as they are given

: "${home:?is set by launch/stageN.sh}"

say() { echo "$(date '+%F %T') job ${SLURM_JOB_ID:-}${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}: $*"; }

# The value that a configuration printed by --cfg has for a key of its top level.
setting() { sed -n "s/^$1: //p" <<<"$configuration" | sed "s/^'\(.*\)'\$/\1/"; }

# The last step that a checkpoint holds, and whether that was the run's last. No Python: it may be in a container.
step() { sed -n 's/.*"step": \([0-9]*\).*/\1/p' "$run_dir/run.json" 2>/dev/null || true; }
complete() {
    local steps
    steps=$(sed -n 's/.*"steps": \([0-9]*\).*/\1/p' "$run_dir/run.json" 2>/dev/null) || true
    [ -n "$steps" ] && [ "$(step)" -ge "$steps" ]
}

# Sets the array `vlm` (how vlm-nemo is called) and the array `container` (srun's words for one).
choose_program() {
    container=()
    if [ -n "${VLM_NEMO_CONTAINER:-}" ]; then
        local mounts=$PWD:$PWD${VLM_NEMO_MOUNTS:+,$VLM_NEMO_MOUNTS}
        container=(--container-image="$VLM_NEMO_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
        vlm=(vlm-nemo)
        [ -z "${VLM_NEMO_PYTHON:-}" ] || vlm=("$VLM_NEMO_PYTHON" -m vlm_nemo)
    elif [ -n "${VLM_NEMO_PYTHON:-}" ]; then
        vlm=("$VLM_NEMO_PYTHON" -m vlm_nemo)
    elif [ -x "$home/.venv/bin/python" ]; then
        vlm=("$home/.venv/bin/python" -m vlm_nemo)
    elif command -v vlm-nemo >/dev/null; then
        vlm=(vlm-nemo)
    else
        echo "error: neither $home/.venv nor vlm-nemo on PATH is there; run make setup on a machine that shares $home" >&2
        exit 2
    fi
}

# Run a command once, before the ranks: here, or where only the container has it, as a step of one task.
once() {
    if [ ${#container[@]} -gt 0 ]; then
        srun --nodes=1 --ntasks=1 --overlap "${container[@]}" env RANK=0 WORLD_SIZE="$SLURM_NTASKS" "$@"
    else
        RANK=0 WORLD_SIZE=$SLURM_NTASKS "$@"
    fi
}

# One rank: torchrun's variables from Slurm's. USR2 is ignored until Python holds it back (runtime/signals.py). Where
# Slurm shows each task one GPU of its own, that is its number 0.
# shellcheck disable=SC2016 # for the shell of the task
rank='trap "" USR2
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export VLM_NEMO_ERROR_FILE=$VLM_NEMO_ERRORS/$RANK
case ${CUDA_VISIBLE_DEVICES:-,} in *,*) ;; *) export LOCAL_RANK=0 ;; esac
exec "$@"'

# Ask the steps to stop until srun ends: a signal that comes while they start is lost.
stop_ranks() {
    [ -z "$asking" ] || return 0
    requested=yes
    say "the time limit is near: asking all ranks to save and end"
    while kill -0 "$srun" 2>/dev/null; do
        scancel --signal=USR2 "$SLURM_JOB_ID" 2>/dev/null || true
        sleep 5
    done &
    asking=$!
}

requeue() {
    say "$*"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}

# run_stage N [key=value …]: the job, from validation to what becomes of it.
run_stage() {
    local stage=$1 words=("${@:2}") word named='' code configuration run_dir state srun='' asking='' requested='' cancelled=''
    trap 'requested=yes' USR2
    trap 'cancelled=yes' TERM
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        echo "error: this is a Slurm job: sbatch launch/stage$stage.sh …; without Slurm: launch/local.sh N train recipe=…" >&2
        exit 2
    fi
    for word in "${words[@]}"; do
        case $word in recipe=*) named=yes ;; esac
    done
    [ -n "$named" ] || words=("recipe=llava15_7b/stage$stage" "${words[@]}")
    # What this job's own earlier attempt wrote is to be used, also by a run that was told to start afresh.
    [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || words+=(checkpoint.resume=true)

    # 1. The surroundings
    choose_program
    local nodes
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export SLURM_NTASKS=${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}
    export MASTER_ADDR=${nodes[0]} MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # megatron-core's overlap relies on the order
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
    # srun does not take it over from sbatch by itself
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

    # 2. The words, before a GPU waits for them
    code=0
    once "${vlm[@]}" train "${words[@]}" --validate >/dev/null || code=$?
    configuration=$([ $code -ne 0 ] || once "${vlm[@]}" train "${words[@]}" --cfg) || code=$?
    if [ $code -ne 0 ]; then
        exit $code
    fi
    run_dir=$(setting run_dir)
    state=$run_dir/slurm
    export VLM_NEMO_ERRORS=$PWD/$state/errors
    case $state in /*) VLM_NEMO_ERRORS=$state/errors ;; esac
    rm -rf "$VLM_NEMO_ERRORS"
    [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -f "$state/failures" # what was counted for an earlier submission
    mkdir -p "$VLM_NEMO_ERRORS"

    # 3. The ranks
    if [ -n "$requested" ]; then
        requeue "the time limit came before the ranks were started; requeued"
    fi
    say "$SLURM_NTASKS ranks on ${nodes[*]} -> $run_dir"
    local more=()
    read -ra more <<<"${VLM_NEMO_SRUN:-}"
    srun --export=ALL --kill-on-bad-exit=1 "${container[@]}" "${more[@]}" \
        bash -c "$rank" rank "${vlm[@]}" train "${words[@]}" &
    srun=$!
    trap stop_ranks USR2
    if [ -n "$requested" ]; then
        stop_ranks # it came between the two
    fi
    while kill -0 "$srun" 2>/dev/null; do
        wait "$srun" || true # a trap ends a wait too
    done
    code=0
    wait "$srun" || code=$?
    trap 'requested=yes' USR2
    [ -z "$asking" ] || kill "$asking" 2>/dev/null || true

    # 4. What becomes of the job
    if [ -n "$cancelled" ]; then
        say "cancelled at step $(step); submit the same command to go on"
        exit 143
    fi
    if [ $code -eq 0 ] && complete; then
        rm -rf "$state"
        say "done: $(step) steps -> $run_dir/checkpoints"
        exit 0
    fi
    if [ $code -eq 0 ] && [ -n "$requested" ]; then
        requeue "stopped after step $(step); requeued, to go on from there"
    fi
    if [ $code -eq 0 ]; then
        say "the ranks ended at step $(step), before the run's end, and not because of the time limit; not requeued"
        exit 3
    fi
    fail "$code"
}

# The ranks failed with this code: an error that the user has to mend ends the job, another one is tried again.
fail() {
    local errors=("$VLM_NEMO_ERRORS"/*) last tries
    if [ -e "${errors[0]}" ]; then
        [ -e "$VLM_NEMO_ERRORS/0" ] || cat "${errors[0]}" >&2 # rank 0 has printed its own
        say "not requeued: the same error would come again"
        exit 2
    fi
    last=$(step)
    echo "${last:-0}" >>"$state/failures"
    tries=$(grep -cx "${last:-0}" "$state/failures")
    if [ "$tries" -gt "${VLM_NEMO_MAX_RESTARTS:-3}" ]; then
        say "failed with exit code $1; failure number $tries at step ${last:-0}, so not requeued (VLM_NEMO_MAX_RESTARTS)"
        exit 1
    fi
    requeue "failed with exit code $1 at step ${last:-0}, failure number $tries there; requeued"
}
