#!/usr/bin/env bash
# Everything that needs a GPU, in ten minutes: what the machine is, tests/gpu, the fused head, training, FP8 against bf16.
#
#   tools/benchmarks/gpu.sh [FOLDER]        results go to FOLDER (default: $OUT, else gpu-results)
#
# Needs a python3 ($PYTHON) with torch for CUDA, megatron-core, pydantic, pyyaml, orjson, zstandard and pytest; megadiff
# itself need not be installed, and nothing is fetched. Transformer Engine is used where it is installed. A part that fails or
# runs out of its time leaves its log and lets the next one begin; the last lines are the table, also in FOLDER/summary.txt.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
out=$(realpath -m "${1:-${OUT:-gpu-results}}")
mkdir -p "$out" || exit
python=${PYTHON:-python3}
export PYTHONPATH=$PWD/tools/benchmarks:$PWD${PYTHONPATH:+:$PYTHONPATH}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
summary=()

part() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 began=$SECONDS code
  shift 2
  echo "== $name (at most $seconds s)"
  timeout --kill-after=10 "$seconds" "$@" > "$out/$name.log" 2>&1
  code=$?
  tail -n 40 "$out/$name.log"
  case $code in
    0) summary+=("$(printf '%-12s ok, %d s' "$name" $((SECONDS - began)))") ;;
    124 | 137) summary+=("$(printf '%-12s OUT OF TIME after %d s; see %s.log' "$name" "$seconds" "$name")") ;;
    *) summary+=("$(printf '%-12s FAILED (%d); see %s.log' "$name" "$code" "$name")") ;;
  esac
}

git rev-parse HEAD > "$out/commit.txt" 2>/dev/null || true
part environment 45 "$python" tools/benchmarks/gpu_environment.py --output "$out"
part tests 170 "$python" -m pytest tests/gpu -p no:cacheprovider --override-ini=addopts= -q --maxfail=20
part head 100 "$python" tools/benchmarks/gpu_head.py --output "$out"
part training 180 "$python" tools/benchmarks/gpu_training.py --seconds 150 --output "$out"
part fp8 90 "$python" tools/benchmarks/gpu_fp8_quality.py --output "$out"
{
  printf '%s\n' "${summary[@]}"
  for name in environment head training fp8; do echo; grep -E '^\||TFLOP|held-out|^device|^torch|ceiling' "$out/$name.log"; done
} | tee "$out/summary.txt"
