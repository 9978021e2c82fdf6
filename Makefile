# make demo   train, forget, and compare with retraining, on real data, in three minutes
# make test   lint, types, C++ and Python tests
# Both make .venv and build the extension first; a second call does no work twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh') setup.py
CXX_FILES = $(shell git ls-files 'csrc/**.cpp' 'csrc/**.h' 'csrc/**.inl' 'csrc/**.cu' 'csrc/**.cuh')

.PHONY: all demo test test-all lint bench clean

all: $(VENV)/.built

$(VENV)/.requirements: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.requirements pyproject.toml $(SOURCES)
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

demo: all
	$(BIN)/delfast demo --output-dir demo-output

lint: all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

test: lint
	$(BIN)/python -m pytest

test-all: lint
	$(BIN)/python -m pytest -m "slow or not slow"

# pinned to one set of threads on both sides; results are kept as JSON
bench: all
	mkdir -p benchmarks/results
	$(BIN)/python -m pytest benchmarks -m "" --benchmark-json=benchmarks/results/cpu.json

clean:
	rm -rf $(VENV) build *.egg-info delfast/_C*.so delfast/_build_info.json
