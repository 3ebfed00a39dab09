# make train: everything, from an empty machine with Python 3.11 to a report. `make help` lists the rest.

# Transparent huge pages for malloc: a step allocates hundreds of MiB anew, and page faults cost a quarter of it on CPU.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
PY := .venv/bin/python
SOURCES := r3jax configs tests bench data examples

# The stamps carry the requirements' checksum: changed requirements are installed, unchanged ones never again.
RUN := .venv/.run-$(shell cat requirements.txt | cksum | cut -d' ' -f1)
DEV := .venv/.dev-$(shell cat requirements.txt requirements-serve.txt requirements-dev.txt | cksum | cut -d' ' -f1)

BENCH := .venv-bench/.done-$(shell cat requirements.txt requirements-bench.txt | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow chaos plan-deps lint format lock audit seeds bench bench-large clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: r3jax needs Python 3.11, 3.12 or 3.13; name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv

$(RUN): | $(PY)
	$(PY) -m pip install --quiet --no-input --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	@rm -f .venv/.run-* && touch $@

$(DEV): | $(RUN)
	$(PY) -m pip install --quiet --no-input --disable-pip-version-check $(PIP_FLAGS) -r requirements-dev.txt
	@rm -f .venv/.dev-* && touch $@

install: $(DEV) ## .venv with all that training, tests and lint need

train: $(RUN) ## both stages on the bundled data set, evaluation, report (needs no accelerator)
	$(PY) -m r3jax.train --config=configs/rl.py

test: $(DEV) ## the tests, without the slow ones
	$(PY) -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=10

plan-deps: $(PY) ## the TPU compiler beside .venv's packages, for r3jax.plan: export PYTHONPATH=.venv/libtpu
	@test -d .venv/libtpu || $(PY) -m pip install --quiet --no-deps --target .venv/libtpu -r requirements-plan.txt

test-slow: $(DEV) plan-deps ## the slow tests
	$(PY) -m pytest -q -m slow --ignore=tests/chaos --durations=10

chaos: $(DEV) ## kills, stops, damaged checkpoints, full disks, lost processes: half an hour
	$(PY) -m pytest -q tests/chaos

lint: $(DEV) ## ruff and mypy
	$(PY) -m ruff check $(wildcard $(SOURCES))
	$(PY) -m ruff format --check $(wildcard $(SOURCES))
	$(PY) -m mypy

format: $(DEV) ## mends what ruff can mend
	$(PY) -m ruff check --fix $(wildcard $(SOURCES))
	$(PY) -m ruff format $(wildcard $(SOURCES))

LOCK := requirements.txt requirements-serve.txt
TOOLS := .cache/lock-tools/bin

$(TOOLS):
	$(PYTHON) -m venv .cache/lock-tools
	$(TOOLS)/python -m pip install --quiet --no-input --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1
	@touch $@

lock: | $(TOOLS) ## requirements.lock anew: all that a run and serve install, with hashes, for Python 3.11 to 3.13
	$(TOOLS)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-annotate \
		--custom-compile-command "make lock" -o requirements.lock $(LOCK)

audit: | $(TOOLS) ## known vulnerabilities of what requirements.lock pins; asks PyPI
	$(TOOLS)/pip-audit --strict --disable-pip --require-hashes -r requirements.lock

seeds: $(RUN) ## three seeds of the default run, and their figures
	for seed in 0 1 2; do \
		$(PY) -m r3jax.train --config=configs/rl.py --config.seed=$$seed --workdir=runs/seed-$$seed || exit $$?; \
	done
	$(PY) -m bench.seeds runs/seed-0 runs/seed-1 runs/seed-2

$(BENCH):
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --no-input --disable-pip-version-check $(PIP_FLAGS) \
		-r requirements-bench.txt
	@rm -f .venv-bench/.done-* && touch $@

bench: $(BENCH) ## our speed beside the peers', in an environment of its own: half an hour on two cores
	for name in "rollout --rounds=2" "sft --rounds=2" "where 25m" "encode --rounds=2" "rl_step --rounds=2" \
		"refresh tiny" start curves index "import 0_5b"; do \
		echo "## $$name" && .venv-bench/bin/python -m bench.$$name || exit $$?; \
	done

bench-large: $(BENCH) ## the same for the 0.5B shape, where 24 GiB hold both
	for name in "rollout 0.5b --rounds=1" "sft 0.5b --rounds=1" "encode 0.5b --rounds=1" "decode --rounds=1" step_memory; do \
		echo "## $$name" && .venv-bench/bin/python -m bench.$$name || exit $$?; \
	done

clean: ## removes .venv and caches; runs/ stays
	rm -rf .venv .venv-bench .cache .pytest_cache .ruff_cache .mypy_cache
	find r3jax tests configs bench -name __pycache__ -prune -exec rm -rf {} +
