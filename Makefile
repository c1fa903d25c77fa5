# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: demo test lint bench clean

demo: $(READY)  ## train and compare the three algorithms on real text
	$(BIN)/wmtp compare --tiny --out runs/demo

test: $(READY)  ## the whole suite, doctests included; GPU tests run where there is a GPU
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## speed and memory against eager torch
	$(BIN)/wmtp bench

# torch first and alone: its pinned build decides what the rest may bring along.
$(READY): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard kernels/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch
	$(BIN)/pip install --quiet -e '.[all]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info wmtp/*.so runs
