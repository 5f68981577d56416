#!/usr/bin/env bash
# Build the sdist and from it the wheel, check what is in them, install the wheel alone into an empty environment, and diff the
# embedded pair from there: few documents and latents, all stages. With --minimum the oldest allowed versions are installed.
set -euo pipefail
cd "$(dirname "$0")/.."
constraints=$PWD/constraints.txt python=$PWD/.venv/bin/python place=build/package
rm -rf dist "$place" && mkdir -p "$place"
if [[ "${1:-}" == --minimum ]]; then
  "$python" .ci/minimum.py > "$place/minimum.txt"
  constraints=$PWD/$place/minimum.txt
fi
"$python" -m build --outdir dist . > "$place/build.log" 2>&1 || { cat "$place/build.log"; exit 1; }
"$python" .ci/check_distributions.py dist
"$python" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check -c "$constraints" dist/*.whl
cp .ci/package.yaml .ci/package.py "$place"
cd "$place" # away from the sources
venv/bin/crossdiff run run --config package.yaml
venv/bin/crossdiff push run me/my-diff --dry-run > card.txt
venv/bin/python package.py
