PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint package minimum clean

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

# The wheel, installed into an empty environment, diffs the embedded pair.
package: .venv/installed
	.ci/package.sh

# The same with the oldest versions that pyproject.toml allows.
minimum: .venv/installed
	.ci/package.sh --minimum

clean:
	rm -rf .venv runs build dist
