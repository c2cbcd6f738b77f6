# Every target sets up what it needs, from a bare Python 3.10+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.PHONY: demo test test-slow test-long fuzz lint bench docs site peers coverage-table dist clean

demo: $(READY)
	$(BIN)/anypatch demo

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

test-long: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m long

fuzz: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m fuzz

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/speed.py

docs: $(READY)
	$(BIN)/python benchmarks/fidelity.py
	$(BIN)/python tools/figures.py

site: $(READY)
	$(BIN)/python tools/build_site.py

peers: $(READY)
	$(BIN)/python tools/peers/__main__.py

coverage-table: $(READY)
	$(BIN)/python tools/coverage_table.py

dist: $(READY)
	$(BIN)/python tools/check_dist.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[all,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist site
