# `make demo`, `make test`, `make test-all` and `make docs` do everything. Each creates .venv if it is missing.
# `make flower-demo` and `make test-flower` need Flower, whose pins conflict: they create .venv-flower.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WHEEL ?= .venv-wheel
LIBRARIES ?= oldest
FLOWER ?= .venv-flower
FLOWER_STAMP := $(FLOWER)/.installed

.PHONY: demo test test-all lint docs notebooks test-notebooks dist test-wheel clean flower-demo test-flower

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

# Runs the notebooks and writes their outputs.
notebooks: $(STAMP)
	$(BIN)/python tests/test_notebooks.py

# Every notebook, from top to bottom; `make test` runs the first one.
test-notebooks: $(STAMP)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 tests/test_notebooks.py

# The wheel and the source archive, in dist/.
dist:
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet --upgrade pip build uv
	rm -rf dist
	$(WHEEL)/bin/python -m build --quiet

# The tests against the installed wheel, whose libraries are the oldest that pyproject.toml allows, or with
# `LIBRARIES=newest` the newest. They run beside a link to the installed package, away from the checkout's.
test-wheel: dist
	$(WHEEL)/bin/uv pip compile --quiet --upgrade --no-deps --resolution lowest-direct pyproject.toml --output-file $(WHEEL)/oldest.txt
	$(WHEEL)/bin/uv pip install --quiet --python $(WHEEL)/bin/python "$$(ls dist/*.whl)[dev]" \
	    $(if $(filter oldest,$(LIBRARIES)),--constraint $(WHEEL)/oldest.txt)
	tree=$$(mktemp -d) && trap 'rm -rf "$$tree"' EXIT \
	    && git ls-files | grep -v '^fedjax_sec/' | tar -cf - -T - | tar -xf - -C "$$tree" && cd "$$tree" \
	    && ln -s "$$($(CURDIR)/$(WHEEL)/bin/python -c 'import fedjax_sec; print(fedjax_sec.__path__[0])')" fedjax_sec \
	    && JAX_PLATFORMS=cpu $(CURDIR)/$(WHEEL)/bin/python -m pytest -n 2 --dist loadfile -m 'not slow' $(TESTS)

# A small experiment on two SuperNodes of this machine, without a download.
flower-demo: $(FLOWER_STAMP)
	$(FLOWER)/bin/fedjax-sec flower run configs/flower/demo.yaml --out results/flower-demo --overwrite

# Real clients: messages, the strategy, and faults on five SuperNodes of this machine.
test-flower: $(FLOWER_STAMP)
	JAX_PLATFORMS=cpu $(FLOWER)/bin/python -m pytest tests/flower fedjax_sec/flower

clean:
	rm -rf $(VENV) $(FLOWER) $(WHEEL) dist results/demo results/flower-demo site

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
