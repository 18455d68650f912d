#!/usr/bin/env bash
# Serve a model: launch/serve.sh [export=DIR | checkpoint=DIR | hf=DIR] [key=value ...]
# RANKS=N spreads a checkpoint over N processes of this machine (parallel.tensor=N).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ "${RANKS:-1}" -gt 1 ]; then
    exec "$root/launch/local.sh" "$RANKS" serve "$@"
fi
if [ -z "${VLM_NEMO_PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    VLM_NEMO_PYTHON=$root/.venv/bin/python
fi
exec "${VLM_NEMO_PYTHON:-python3}" -m vlm_nemo serve "$@"
