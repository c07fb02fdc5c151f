#!/usr/bin/env bash
# Runs all that needs a GPU, in ten minutes: facts of the machine, tests/gpu, fused head, training, FP8 against bf16.
#
#   tools/benchmarks/gpu.sh [FOLDER]        results go to FOLDER (default: $OUT, else gpu-results)
#
# Needs a python3 ($PYTHON) with torch for CUDA and its triton, megatron-core, numpy, pydantic, pyyaml, psutil,
# filelock, orjson, zstandard, rich, pytest and hypothesis; megadiff itself need not be installed, and
# nothing is downloaded. The FP8 parts also need Transformer Engine, installed or on PYTHONPATH; without it they are
# left out, and the table shows that.
#
# It ends after GPU_SECONDS (default 560). After a part that fails or runs out of time the next one begins; a part that
# has no time left is not run. FOLDER gets summary.txt (the table, updated after each part), logs.txt and a few .json.
case ${1:-} in -h | --help) sed -n '/^# [A-Z]/,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;; esac
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
out=$(realpath -m "${1:-${OUT:-gpu-results}}")
mkdir -p "$out" || exit
rm -f "$out"/{summary,logs}.txt "$out"/{environment,head,training,fp8_quality}.json
python=${PYTHON:-python3}
deadline=$((SECONDS + ${GPU_SECONDS:-560}))
export PYTHONPATH=$PWD/tools/benchmarks:$PWD${PYTHONPATH:+:$PYTHONPATH}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
states=("commit       $(git rev-parse HEAD 2> /dev/null || echo unknown)") tables="" failures=0
shown='^\||TFLOP|TB/s|held-out|^(device|torch|transformer-engine|error:|SKIPPED|FAILED|ERROR)'
shown+='|(passed|failed|skipped|error).* in [0-9.]+'

part() { # NAME SECONDS COMMAND...; an argument LEFT becomes the part's limit minus 25 s, for starting and ending
  local name=$1 limit=$2 left=$((deadline - SECONDS)) began=$SECONDS code=0 before=0 state
  shift 2
  ((limit = limit < left ? limit : left))
  if ((limit < 10)); then
    state="not run, no time left"
  else
    echo "== $name (at most $limit s)" | tee -a "$out/logs.txt"
    before=$(wc -l < "$out/logs.txt")
    timeout --kill-after=10 "$limit" "${@/#LEFT/$((limit - 25))}" >> "$out/logs.txt" 2>&1 || code=$?
    tail -n "+$((before + 1))" "$out/logs.txt" | tail -n 40
    tables+=$'\n'"$name"$'\n'$(tail -n "+$((before + 1))" "$out/logs.txt" | grep -E "$shown")$'\n'
    case $code in
      0) state="ok, $((SECONDS - began)) s" ;;
      124 | 137) state="OUT OF TIME after $((SECONDS - began)) s" ;;
      *) state="FAILED ($code) after $((SECONDS - began)) s" ;;
    esac
  fi
  ((failures += code != 0))
  states+=("$(printf '%-12s %s' "$name" "$state")")
  printf '%s\n' "${states[@]}" "$tables" > "$out/summary.txt"
}

part environment 45 "$python" tools/benchmarks/gpu_environment.py --output "$out"
part tests 170 "$python" -m pytest tests/gpu -p no:cacheprovider --override-ini=addopts= -q -rsfE --tb=short \
  --maxfail=20 --continue-on-collection-errors
part head 90 "$python" tools/benchmarks/gpu_head.py --output "$out"
part training 170 "$python" tools/benchmarks/gpu_training.py --seconds LEFT --output "$out"
part fp8 150 "$python" tools/benchmarks/gpu_fp8_quality.py --output "$out"
echo
cat "$out/summary.txt"
exit $((failures > 0))
