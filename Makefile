PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

# Installed once; again when the dependencies change.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/crossdiff run

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check src tests recipes
	$(BIN)/ruff format --check src tests recipes
	$(BIN)/mypy

clean:
	rm -rf .venv runs
