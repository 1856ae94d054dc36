# Each target installs what it needs by itself: `env` builds .venv once and is quick afterwards.
PYTHON := .venv/bin/python
# An environment of your own for what needs a GPU, instead of .venv: GPU_PYTHON=python3
GPU := $(or $(GPU_PYTHON),$(PYTHON))
RESULTS ?= runs
BENCHMARKS := $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py)))

# Without bytecode every rank and server would compile all of torch anew at its start.
unexport PYTHONDONTWRITEBYTECODE

TEST_PARTS := test-servers test-slurm test-ranks test-units

.PHONY: help env quickstart test $(TEST_PARTS) lint format bench gpu-test gpu-bench

help:
	@echo "make quickstart   run the main job on this machine, without a GPU; results in runs/quickstart"
	@echo "make test         run the tests; those that need a GPU are skipped where there is none"
	@echo "make test-servers, test-slurm, test-ranks, test-units   a part of them each"
	@echo "make lint         ruff and mypy"
	@echo "make format       let ruff rewrite the files, and renew the tables of docs/configuration.md"
	@echo "make bench        every benchmark in its quick form"
	@echo "make gpu-test     only the tests that need a GPU; GPU_PYTHON=python3 runs them without .venv"
	@echo "make gpu-bench    both GPU benchmarks; JSON in runs, or RESULTS=folder"
	@echo "make env          only build .venv"

env:
	@$(if $(GPU_PYTHON),:,tools/env.sh)

quickstart: env
	$(PYTHON) tools/quickstart.py

# Half of the time the tests wait: for servers, for Slurm, for a hang to be noticed. So two parts
# run side by side, the longest first, each one's output shown when it has ended.
test: env
	@$(MAKE) --no-print-directory -j2 -k -O $(TEST_PARTS)

# Servers, nodes and ranks that share two cores sometimes miss a deadline that they keep when alone.
# So what fails here runs once more, by itself; the first failure stays in the output.
AGAIN := --last-failed --last-failed-no-failures none
define pytest_twice
	$(PYTHON) -m pytest $(1) -o cache_dir=.pytest_cache/$@ || { test $$? -eq 1 && \
	  echo "== $@: what failed runs once more, by itself" && \
	  $(PYTHON) -m pytest $(1) -o cache_dir=.pytest_cache/$@ $(AGAIN); }
endef

test-servers: env
	$(call pytest_twice,tests/server)

test-slurm: env
	$(call pytest_twice,tests/slurm)

test-ranks: env
	$(call pytest_twice,tests/distributed)

test-units: env
	$(PYTHON) -m pytest tests/unit tests/gpu

lint: env
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

format: env
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format
	$(PYTHON) tools/config_table.py

bench: env
	@set -e; for script in $(BENCHMARKS); do echo "== $$script --quick"; $(PYTHON) $$script --quick; done

gpu-test: env
	$(GPU) -m pytest tests/gpu

gpu-bench: env
	@mkdir -p $(RESULTS)
	$(GPU) -m benchmarks.gpu_loss --json $(RESULTS)/gpu_loss.json
	$(GPU) -m benchmarks.gpu_step --json $(RESULTS)/gpu_step.json
