#!/usr/bin/env bash
# Make .venv with this project and everything that its tests and its demo need. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

python=
for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
    if fits "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: ${PYTHON:-python3} is not Python 3.11 or 3.12; install one of them or name it: make PYTHON=/path/to/python3.12" >&2
    exit 2
fi
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    echo "error: $python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 2
fi
if [ -x .venv/bin/python ] && ! fits .venv/bin/python; then
    echo "error: .venv was made with another Python; remove it and run make again" >&2
    exit 2
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check)
echo "installing into .venv: a few minutes the first time"
"${pip[@]}" install -q -c constraints.txt torch
"${pip[@]}" install -q -c constraints.txt -e '.[dev,nemo,serve,export,rtx]'
# What some of transformers' processors ask for, for their tests alone and out of everybody else's way: torchvision's
# wheel is a CUDA build, which does not load beside this torch without help (tests/weights/auto_processor.py).
[ -d .venv/processors/torchvision ] ||
    "${pip[@]}" install -q -c constraints.txt --no-deps --target .venv/processors torchvision num2words
