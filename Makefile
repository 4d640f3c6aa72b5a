# make demo: a mesh from the bundled image.  make test: the tests.  make lint: style, types, layers, sizes.
# The environment is made when it is missing and kept until pyproject.toml changes.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
DEMO := outputs/chair.glb

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/python scripts/gen_mesh.py image=data/samples/chair.png output=$(DEMO) preview=true
	@echo "The mesh is in $(DEMO), an image of it in $(DEMO:.glb=.png)."

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy elastic3d scripts
	$(BIN)/lint-imports
	$(BIN)/python .ci/check_sizes.py

clean:
	rm -rf $(VENV) outputs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.10, 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@ $(VENV)/.installed
