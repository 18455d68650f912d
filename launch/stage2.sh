#!/usr/bin/env bash
# Stage 2 on Slurm, projector and language model on conversations: sbatch [sbatch options] launch/stage2.sh [recipe=NAME] [key=value …]
# The lines below are defaults for one node of eight GPUs; sbatch's own options come before them. See launch/lib.sh.
#SBATCH --job-name=stage2
#SBATCH --output=slurm-%j-%x.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=B:USR2@300
set -euo pipefail

# Slurm runs a copy of this file from a folder of its own.
home=${VLM_NEMO_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
if [ ! -f "$home/launch/lib.sh" ]; then
    echo "error: $home is not the project's folder: submit from there, or set VLM_NEMO_HOME to it" >&2
    exit 2
fi
# shellcheck source=launch/lib.sh
source "$home/launch/lib.sh"
run_stage 2 "$@"
