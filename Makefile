# make demo   train, forget, and compare with retraining, on real data, in three minutes
# make check  lint, types and the fast tests, for the inner loop
# make test   lint, types, C++ and Python tests; make test-all adds the wide sweeps, make coverage lists what no test runs
# make wheels  wheels that need no compiler, for each Python that is there, in dist/: for CPUs, and for CUDA if there is a toolkit
# make docs   the documentation as a site, in build/docs/index.html; warnings are errors, and nothing is downloaded
# make release-check  builds the docs, and checks version, changelog, wheels of dist/, figures and licences: a line for each
# make bench  every kernel, training step and whole job against its baseline, hours; make results also renews the README's tables
# All make .venv and build the extension first; a second call does no work twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc build_support -type f -not -name '*.pyc') CMakeLists.txt setup.py delfast/ops/schemas.py delfast/_version.py
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: all demo check test test-all coverage lint wheels docs release-check bench results clean

all: $(VENV)/.built

$(VENV)/.requirements: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

# DELFAST_NATIVE=1: in development, native kernels that cannot be built are an error, which gives the reason
$(VENV)/.built: $(VENV)/.requirements pyproject.toml $(SOURCES)
	DELFAST_NATIVE=1 $(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

demo: all
	$(BIN)/delfast demo --output-dir demo-output

lint: all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/typos
	$(BIN)/lint-imports

# a process for each CPU, of one thread: most tests are of small networks, whose threads would wait for one another;
# a file is run by one process, since its tests share fixtures, in the order that tests/conftest.py gives
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

check: lint
	$(PYTEST) -m "not slow and not long"

test: lint
	$(PYTEST) --durations 10

test-all: lint
	$(BIN)/python -m pytest -m "slow or not slow"

# prints the total, and each file that the tests cover to less than 90 %
coverage: all
	$(PYTEST) --cov --cov-report=
	$(BIN)/coverage html --quiet
	$(BIN)/coverage report | awk 'NR == 1 || /^TOTAL/ || $$NF + 0 < 90 && /%$$/'

wheels: all
	$(BIN)/python -m build_support.wheels

# a page that was removed would stay, and a cached page would not warn again: each build is a new one
docs: all
	rm -rf build/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env --doctree-dir build/doctrees docs build/docs

# the wheels are not built again: those of dist/ are the ones to publish
release-check: docs
	$(BIN)/python -m build_support.release_check

# both sides take turns on the same threads; the results are kept as JSON: of kernels, and of each other subject
SUBJECTS := calls steps job memory
bench: all
	mkdir -p benchmarks/results
	$(BIN)/python -m pytest benchmarks $(SUBJECTS:%=--ignore=benchmarks/test_%.py) -m "" --benchmark-json=benchmarks/results/cpu.json
	for name in $(SUBJECTS); do \
	  $(BIN)/python -m pytest benchmarks/test_$$name.py -m "" --benchmark-json=benchmarks/results/$$name.json || exit; \
	done

# measures again, and writes the tables of README.md and docs/
results: bench demo
	cp demo-output/summary.json benchmarks/results/demo.json
	$(BIN)/python -m benchmarks.tables

clean:
	rm -rf $(VENV) build *.egg-info delfast/_C*.so delfast/libdelfast_ops.so delfast/_build_info.json .coverage htmlcov
