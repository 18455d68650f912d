# make demo    train a small vision-language model on this machine and show what it answers (DEMO=short: a few steps)
# make test    run the tests (make test-slow: those too that wait for minutes)
# make check   lint, types, floors, shell scripts, Dockerfile
# make clean   remove caches (not .venv, not runs/)
#
# Each sets up what it needs in .venv. PYTHON=/path/to/python3.12 chooses the interpreter.

DEMO ?= full
bin := .venv/bin
ready := $(bin)/.ready

.PHONY: demo test test-slow check clean setup

demo: $(ready)
	@DEMO=$(DEMO) VLM_NEMO_PYTHON=$(bin)/python launch/demo.sh

test: $(ready)
	$(bin)/python -m pytest -q

test-slow: $(ready)
	$(bin)/python -m pytest -q -m ""

check: $(ready)
	$(bin)/ruff check .
	$(bin)/mypy
	$(bin)/lint-imports
	$(bin)/shellcheck launch/*.sh .ci/run tests/slurm/*.sh
	$(bin)/hadolint Dockerfile

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find vlm_nemo tests data -name __pycache__ -prune -exec rm -rf {} +

setup: $(ready)

$(ready): pyproject.toml constraints.txt launch/setup.sh
	@PYTHON="$(PYTHON)" launch/setup.sh
	@touch $@
