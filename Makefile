# Each target installs what it needs by itself: `env` builds .venv once and is quick afterwards.
PYTHON := .venv/bin/python
# An environment of your own for what needs a GPU, instead of .venv: GPU_PYTHON=python3
GPU := $(or $(GPU_PYTHON),$(PYTHON))
RESULTS ?= runs
BENCHMARKS := $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py)))

# Without bytecode every rank and server would compile all of torch anew at its start.
unexport PYTHONDONTWRITEBYTECODE

TEST_PARTS := test-servers test-slurm test-ranks test-units

.PHONY: help env quickstart test test-again $(TEST_PARTS) lint format bench gpu-test gpu-bench

help:
	@echo "make quickstart   run the main job on this machine, without a GPU; results in runs/quickstart"
	@echo "make test         run the tests; those that need a GPU are skipped where there is none"
	@echo "make test-again   once more those that failed in the last make test"
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
# run side by side, the longest first, each one's output shown when it has ended. Together they
# sometimes miss a deadline that they keep alone: what failed runs once more then, one by one.
test: env
	@$(MAKE) --no-print-directory -j2 -k -O $(TEST_PARTS) || $(MAKE) --no-print-directory test-again

# Each part keeps which of its tests failed, and pytest's exit code: 1 where tests failed, more
# where it could not run them.
define run_part
	@mkdir -p .pytest_cache/$@ && rm -f .pytest_cache/$@/code
	@$(PYTHON) -m pytest $(1) -o cache_dir=.pytest_cache/$@; \
	  code=$$?; echo $$code >.pytest_cache/$@/code; exit $$code
endef

test-again: env
	@for part in $(TEST_PARTS); do case $$(cat .pytest_cache/$$part/code) in \
	  0) ;; \
	  1) echo "== $$part: what failed runs once more, by itself"; \
	     $(PYTHON) -m pytest --last-failed -o cache_dir=.pytest_cache/$$part || exit 1 ;; \
	  *) exit 1 ;; \
	esac; done

test-servers: env
	$(call run_part,tests/server)

test-slurm: env
	$(call run_part,tests/slurm)

test-ranks: env
	$(call run_part,tests/distributed)

test-units: env
	$(call run_part,tests/unit tests/gpu)

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
