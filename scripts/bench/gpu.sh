#!/usr/bin/env bash
# What the project wants to know of an NVIDIA GPU; writes JSON files to a folder: scripts/bench/gpu.sh [--quick] [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."

quick=() folder=benchmarks/gpu
for word in "$@"; do
  case $word in
    --quick) quick=(--quick) ;;
    -*) echo "usage: scripts/bench/gpu.sh [--quick] [FOLDER]" >&2; exit 2 ;;
    *) folder=$word ;;
  esac
done
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: torch finds no CUDA device here; this benchmark needs one NVIDIA GPU." >&2
  exit 1
fi
mkdir -p "$folder"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$folder/device.csv"

# No step waits for the device: the driver itself refuses.
"$python" -m pytest -q -m gpu tests/engine/test_engine_sync.py
# The textbook, timm, Lightning and cvtrain in each format; the zoo in float32, amp and bf16.
"$python" scripts/bench/step.py --device cuda "${quick[@]}" --json "$folder/step.json"
# ResNet-50 at 224: float32, TF32 and amp; the loaders; the artifacts' latencies.
"$python" scripts/bench/gpu.py "${quick[@]}" --json "$folder/gpu.json"
