# `make demo`, `make test`, `make test-all` and `make docs` do everything. Each creates .venv if it is missing.
# `make flower-demo` and `make test-flower` need Flower, whose pins conflict: they create .venv-flower.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FLOWER ?= .venv-flower
FLOWER_STAMP := $(FLOWER)/.installed

.PHONY: demo test test-all lint docs clean flower-demo test-flower

demo: $(STAMP)
	$(BIN)/fedjax-sec demo --out results/demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

# As `test`, with what is marked slow: fuzzing, kills at every file operation, every configuration.
test-all: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# The documentation's site, in site/; a warning fails it, and so does a public name without words.
docs: $(STAMP)
	JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# A small experiment on two SuperNodes of this machine, without a download.
flower-demo: $(FLOWER_STAMP)
	$(FLOWER)/bin/fedjax-sec flower run configs/flower/demo.yaml --out results/flower-demo --overwrite

# Real clients: messages, the strategy, and faults on five SuperNodes of this machine.
test-flower: $(FLOWER_STAMP)
	JAX_PLATFORMS=cpu $(FLOWER)/bin/python -m pytest tests/flower fedjax_sec/flower

clean:
	rm -rf $(VENV) $(FLOWER) results/demo results/flower-demo site

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and f"Python 3.11 or later is needed, this is {v}; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(FLOWER_STAMP): pyproject.toml constraints-flower.txt
	$(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip install --quiet --upgrade pip
	$(FLOWER)/bin/python -m pip install --quiet --constraint constraints-flower.txt --editable '.[flower]' pytest beartype
	touch $@
