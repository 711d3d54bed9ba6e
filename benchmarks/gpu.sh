#!/usr/bin/env bash
# All that is to be measured on a GPU, in under ten minutes and without a network: benchmarks/gpu.sh [SECTION...] [--out FILE]
# PYTHON names an interpreter with the packages of requirements*.lock; .venv's is the default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
"$python" -c 'import torch, timm, peft, monai, tifffile' || {
    echo "gpu.sh: $python lacks packages: make venv, or PYTHON=/path/to/python" >&2
    exit 1
}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || echo "gpu.sh: no GPU that torch can use" >&2
export PYTHONPATH="$PWD/src" EMADAPT_TRACKING=off
exec timeout 600 "$python" -m benchmarks.gpu "$@"
