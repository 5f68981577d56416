PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test faults lint package minimum docs notebook clean

# Installed once; again when the dependencies change.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/crossdiff run

# One process per core (at most eight), each with one thread. The tests of a file share their fixtures.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# Break a tiny run in every way that we can think of (docs/reliability.md). Full disks need root on Linux.
faults: .venv/installed
	$(BIN)/python tests/faults/faults.py all

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Install the wheel into an empty environment and diff the embedded pair with it.
package: .venv/installed
	.ci/package.sh

# The same with the oldest versions that pyproject.toml allows.
minimum: .venv/installed
	.ci/package.sh --minimum

# The documentation in build/site. Warnings (a broken link, a page missing from the menu, a missing example) are errors.
docs: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Execute the notebook on the demo's run and keep its outputs in the file.
notebook: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebook]'
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf .venv runs build dist
