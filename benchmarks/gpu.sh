#!/usr/bin/env bash
# All that is to be measured on a GPU, in under ten minutes and without a network: benchmarks/gpu.sh [SECTION...] [--out FILE]
# PYTHON names an interpreter with the packages of requirements*.lock; .venv's is the default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
"$python" -c 'from importlib.util import find_spec; assert all(map(find_spec, ("torch", "timm", "peft", "monai", "tifffile")))' || {
    echo "gpu.sh: $python lacks packages: make venv, or PYTHON=/path/to/python" >&2
    exit 1
}
export PYTHONPATH="$PWD/src" EMADAPT_TRACKING=off
exec timeout 600 "$python" -m benchmarks.gpu "$@"
