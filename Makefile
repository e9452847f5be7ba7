# Sets up, runs, tests. `make` alone lists what there is; more options go in ARGS, for example
#   make demo ARGS="--config effort=0.1"      make test ARGS="-k report"

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
READY := $(VENV)/.ready
CORES ?= $(shell nproc 2>/dev/null || echo 1)
# Where results/ goes.
DIR ?= .
ARGS ?=
# Of drill and fuzz.
MINUTES ?= 5
SEED ?= 0

# The python3 in PATH first; 3.14 and later only if nothing older is there, since they may have to
# build a dependency from source.
PYTHON ?= $(shell for below in 14 99; do for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, $$below))" 2>/dev/null \
	&& { command -v $$p; exit; }; done; done)

# The jobs of the workflow say `python`, and find the environment's own.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help setup demo plan spent test drill fuzz bench lint lock docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv from the pinned requirements; skipped when done
	@echo "[setup] $(VENV) is ready"

# The stamp comes last, and a set-up starts afresh, so that an interrupted one leaves no trace.
$(READY): requirements.txt pyproject.toml
	@if [ -L $(VENV) ]; then echo "error: expected $(VENV) to be a folder, found a link: what it" \
		"leads to would be emptied; remove the link" >&2; exit 2; fi
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || { \
		echo "error: expected Python 3.11 or later, found '$(PYTHON)' and as python3" \
		"$$(python3 --version 2>&1 || true); install one, or name one:" \
		"make setup PYTHON=/path/to/python3.12" >&2; exit 2; }
	@echo "[setup 1/4] making $(VENV) with $(PYTHON)"
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { \
		echo "[setup 1/4] Python's venv is missing; installing python3-venv"; \
		{ [ "$$(id -u)" = 0 ] && apt-get -qq update >/dev/null \
			&& apt-get -qq install -y python3-venv >/dev/null; } \
		|| { echo "error: expected Python's venv module; as root: apt-get install python3-venv" >&2; \
			exit 2; }; }
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "[setup 2/4] installing uv, which downloads and unpacks in parallel"
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.txt > $(VENV)/uv.txt
	@pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt
	@echo "[setup 3/4] installing the pinned packages: 3 GB to download, mostly PyTorch for CUDA;" \
		"6 GB on disk"
	@{ uv pip sync --python $(VENV) --require-hashes --build-constraints requirements.txt \
		--compile-bytecode requirements.txt 2>&1 | grep --line-buffered -v '^ [+-] '; } \
		|| { echo "[setup 3/4] uv failed; trying pip, which heeds pip's own mirrors (slower)"; \
		pip install --disable-pip-version-check --require-hashes -r requirements.txt; }
	@echo "[setup 4/4] installing kt itself, editable"
	@# By a line with its path: the finder that setuptools would write takes each Python 8 ms.
	@uv pip install --quiet --python $(VENV) --no-deps --no-build-isolation \
		--config-setting editable_mode=compat --editable .
	@touch $@

demo: $(READY) ## run the workflow with config.yaml; print the table and the place of the report
	@echo "[demo] running the workflow on $(CORES) cores; results go to $(abspath $(DIR))/results"
	@snakemake --cores $(CORES) --directory "$(DIR)" $(ARGS)
	@cat "$(DIR)/results/report/summary.txt"
	@echo "Report: $(abspath $(DIR))/results/report/index.html"

plan: $(READY) ## what a run will do and cost, before it; ARGS as for demo
	@python -m kt.plan --cores $(CORES) --directory "$(DIR)" $(ARGS)

spent: $(READY) ## the last plan against what the run did cost
	@python -m kt.plan --directory "$(DIR)" --spent

# A worker on each core and two more, since those with the files of Slurm often wait. Each takes
# whole files, in the order of tests/conftest.py; with more than eight all would wait for those two.
test: $(READY) ## run all tests
	@echo "[test] running pytest; the report is opened in" \
		"$${CHROMIUM:-$$(command -v chromium || echo 'no browser: chromium is missing')}"
	@pytest -q -n $$(($(CORES) + 2)) --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

drill: $(READY) ## kill the workflow at random moments for MINUTES, compare; SEED=
	@echo "[drill] killing and comparing for $(MINUTES) minutes and what the last runs take"
	@PYTHONPATH="$(CURDIR)" python tests/drill.py --minutes $(MINUTES) --seed $(SEED)

fuzz: $(READY) ## read damaged files and odd configurations for MINUTES; SEED=
	@echo "[fuzz] reading damaged files for $(MINUTES) minutes"
	@PYTHONPATH="$(CURDIR)" python tests/fuzz.py --minutes $(MINUTES) --seed $(SEED)

# Peers only add to the environment: what the product itself is pinned to, they must take as it is.
$(VENV)/.bench: $(READY) bench/requirements.txt
	@echo "[bench] installing the peers"
	@uv pip install --quiet --python $(VENV) --require-hashes --build-constraints requirements.txt \
		--constraints requirements.txt --requirements bench/requirements.txt
	@touch $@

bench: $(VENV)/.bench ## compare with peers and floors, 15 minutes; ARGS="--only NAME", "--list"
	@python -m bench $(ARGS)

lint: $(READY) ## check style and the workflow's rules
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile rules
	snakemake --lint

lock: $(READY) ## remake requirements.txt from pyproject.toml; ARGS=--upgrade moves to newer versions
	uv pip compile pyproject.toml --extra dev --output-file requirements.txt --quiet \
		--universal --python-version 3.11 --generate-hashes \
		--no-header --no-annotate --no-emit-index-url $(ARGS)
	uv pip compile bench/requirements.in --output-file bench/requirements.txt --quiet \
		--universal --python-version 3.11 --generate-hashes --constraints requirements.txt \
		--no-header --no-annotate --no-emit-index-url $(ARGS)

docs: $(READY) ## remake the reference of the configuration from its schema
	python -m kt.reference > $(VENV)/config.md
	mv $(VENV)/config.md docs/config.md

clean: ## remove the environment and caches; results stay
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache kt.egg-info build
