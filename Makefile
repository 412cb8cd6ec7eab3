# A newcomer needs two of these: `make demo` and `make test`. Each sets itself up, from Python 3.11+, pip and make.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
STARTED := $(shell date +%s)

# What `make soak` runs: kills (ROUNDS=20), fuzzing (SECONDS=60 for each kind of file), faces; SEED=0 for the first two.
# On request: golden, which trains as another commit did (GOLDEN_BASE=HEAD~1).
SOAK ?= kills fuzzing faces
export ROUNDS SECONDS SEED GOLDEN_BASE

.PHONY: setup demo test unit soak lint format docs pins clean

setup: $(READY)

$(READY): pyproject.toml setup.py requirements/dev.txt requirements/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/uv.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)
	$(BIN)/recognition demo --started $(STARTED)

# A worker for each core takes a file at a time, whose tests share what is slow to set up; the long ones come first.
# The number at the end is the part of lines and branches that the workers' own processes ran, ranks not included.
test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
	  --cov --cov-report=
	@echo "covered by tests: $$($(BIN)/coverage report --format=total) %"

# The quick part of the tests: no ranks, no training, no kernels.
unit: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile -m "not slow and not distributed and not gpu"

# What is long and need not be shown for every change.
soak: $(READY)
	$(BIN)/python -m pytest -ra $(SOAK:%=tests/soak/%.py)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The reference of settings, from their descriptions.
docs: $(READY)
	$(BIN)/python -m recognition.config.reference > docs/settings.new
	mv docs/settings.new docs/settings.md

# Newer versions of everything that is pinned.
pins: $(READY)
	for pair in run:all dev:dev; do \
	  $(BIN)/uv pip compile pyproject.toml --extra $${pair#*:} --upgrade --universal --python-version 3.11 \
	    --generate-hashes --no-header --no-annotate --quiet \
	    --output-file requirements/$${pair%:*}.txt || exit 1; \
	done

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build *.egg-info
