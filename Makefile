# `make train` and `make test` each set everything up first, on a machine with Python 3.9 to 3.11.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test test-cu112 gpu-kit parity bench lint check sanitize soak clean lock
.DELETE_ON_ERROR:

train: $(READY)
	$(BIN)/python scripts/train_lenet.py $(ARGS)

test: lint check

check: $(READY)
	$(BIN)/python -m pytest -n 2 $(ARGS)

# Everything against the built-in and a NumPy oracle; ARGS=--full for the whole grid.
parity: $(READY)
	$(BIN)/python scripts/parity_report.py $(ARGS)

# Speed and memory against the built-in; results in ARGS="--out DIRECTORY".
bench: $(READY)
	$(BIN)/python scripts/benchmark.py $(ARGS)

# The kernel's and the contract's tests on a kernel that GCC's sanitizers watch, built beside the
# usual one; what Python and MXNet leak at exit is not reported. ARGS="-k blocked" for some of them.
SANITIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZED := CXX=g++ SCRATCHBN_CACHE=$(CURDIR)/build/sanitize SCRATCHBN_CXXFLAGS="$(SANITIZE)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
sanitize: $(READY)
	$(SANITIZED) $(BIN)/python -c "from scratchbn import native; native.build()"
	$(SANITIZED) LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest -n 2 --backend native tests/backends tests/contract $(ARGS)

# Random nets in child processes, ours and the built-in; ARGS="--minutes 30".
soak: $(READY)
	$(BIN)/python scripts/soak.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The suite on the mxnet-cu112 wheel, in .venv-cu112 (several GB), with or without an NVIDIA driver.
test-cu112: $(READY)
	$(BIN)/python scripts/suite_on_cu112.py $(ARGS)

# What scripts/gpu_check.py takes to a machine with a card, in build/gpu-kit.
gpu-kit: $(READY)
	PYTHONPATH=scripts $(BIN)/python -m gpu_kit.prepare $(ARGS)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 9) <= sys.version_info < (3, 12))' || \
	  { echo "MXNet 1.9.1 needs Python 3.9 to 3.11; name one with 'make PYTHON=...'" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	$(BIN)/python -m scratchbn build-native || echo "without the compiled kernel everything works, slower"
	$(BIN)/python -m scratchbn doctor > $(VENV)/doctor.txt || { cat $(VENV)/doctor.txt >&2; exit 1; }
	@touch $@

# The versions that `make` installs; run after a change of the dependencies in pyproject.toml.
lock: $(READY)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11 --quiet \
	  --no-annotate --no-header --no-emit-index-url --no-emit-find-links -o requirements.lock

clean:
	rm -rf $(VENV) .venv-cu112 build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
