PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint package minimum docs notebook clean

# Installed once; again when the dependencies change.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/crossdiff run

# A process a core (eight at most), each with one thread; a file's tests share what they have set up.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel, installed into an empty environment, diffs the embedded pair.
package: .venv/installed
	.ci/package.sh

# The same with the oldest versions that pyproject.toml allows.
minimum: .venv/installed
	.ci/package.sh --minimum

# The documentation in build/site; a warning (a broken link, a page that is not in the menu, an example that is gone) fails.
docs: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The notebook, executed on the demo's run; its outputs are kept in the file.
notebook: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebook]'
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf .venv runs build dist
