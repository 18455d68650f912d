#!/usr/bin/env bash
# Run any verb on N processes of this machine: launch/local.sh N VERB [key=value ...]
# A bad word or layout ends here, in one line with exit code 2; signals go on to the processes.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: launch/local.sh N VERB [key=value ...], with N processes" >&2
    exit 2
fi
if [ -z "${VLM_NEMO_PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    VLM_NEMO_PYTHON=$root/.venv/bin/python
fi
python=${VLM_NEMO_PYTHON:-python3}

for word in "$@"; do
    case $word in
        -*) WORLD_SIZE=$1 RANK=0 exec "$python" -m vlm_nemo "${@:2}" ;; # --help, --cfg, --validate: one process answers
    esac
done
WORLD_SIZE=$1 RANK=0 "$python" -m vlm_nemo "${@:2}" --validate >/dev/null
exec "$python" -m vlm_nemo.runtime.local "$@"
