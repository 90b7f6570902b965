# Two commands do everything: `make study` and `make test`. Both create .venv first if it is not there.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BENCH_VENV ?= .venv-bench
BENCH := $(BENCH_VENV)/bin/python -m
STAMP := $(VENV)/.installed
MINUTES ?= 30

.PHONY: help install study test check format bench chaos soak fuzz clean

help: ## Show what each target does.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  \1\t/'

install: $(STAMP) ## Create .venv and install the project with everything needed to work on it.

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

study: $(STAMP) ## Probe and search the shipped mini model, export the winner to exports/mini, verify and certify it.
	$(BIN)/hyq-search plan studies/mini.yaml
	$(BIN)/hyq-search sensitivity studies/mini.yaml
	$(BIN)/hyq-search run studies/mini.yaml
	$(BIN)/hyq-search front studies/mini.yaml
	$(BIN)/hyq-search explain studies/mini.yaml balanced
	$(BIN)/hyq-search export studies/mini.yaml --pick balanced --out exports/mini --overwrite
	$(BIN)/hyq-search verify exports/mini
	$(BIN)/hyq-search certify exports/mini --study studies/mini.yaml
	@echo
	@echo "Compare the trials:   $(BIN)/hyq-search ui studies/mini.yaml"
	@echo "Render the winner:    $(BIN)/hyq-search render exports/mini --prompt 'a red circle moving left on a black background'"

test: $(STAMP) ## Run the tests, two files at a time, because tests of many processes mostly wait.
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: $(STAMP) ## Format check, lint, types and import contracts.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Format the code and fix what can be fixed by itself.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BENCH_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(BENCH_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $@

bench: $(BENCH_VENV)/.installed ## Measure speed against other libraries and write docs/benchmarks.md (an hour; leave the machine alone).
	$(BENCH) tools.bench.linears --json docs/benchmarks/linears.json
	$(BENCH) tools.bench.attention --json docs/benchmarks/attention.json
	$(BENCH) tools.bench.recipes studies/mini.yaml --json docs/benchmarks/denoiser.json
	$(BENCH) tools.bench.quantizing --json docs/benchmarks/quantizing.json
	$(BENCH) tools.bench.rank_split --json docs/benchmarks/rank_split.json
	$(BENCH) tools.bench.streaming --folder $${TMPDIR:-/tmp} --json docs/benchmarks/streaming.json
	$(BENCH) tools.bench.page

chaos: $(STAMP) ## Run a study under 50 faults in namespaces of its own (Linux, root, PostgreSQL; 20 to 25 minutes).
	nice -n 19 $(BIN)/python -m tools.chaos --faults 50

fuzz: $(STAMP) ## Fuzz every reader of files for MINUTES of computing each, 30 by default (first: pip install ".[fuzz]").
	for target in $$($(BIN)/python -m tools.fuzz list); do \
	  nice -n 19 $(BIN)/python -m tools.fuzz $$target --minutes $(MINUTES) || exit 1; done

soak: $(STAMP) ## Run the mini study for an hour and see that memory, handles and disk do not grow.
	nice -n 19 $(BIN)/python -m tools.soak --minutes 60 --keep mlruns/soak

clean: ## Remove caches and built files; studies and exports stay.
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
