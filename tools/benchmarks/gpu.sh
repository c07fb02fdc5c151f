#!/usr/bin/env bash
# Runs all that needs a GPU, in less than ten minutes: facts of the machine, tests/gpu, training, FP8 against bf16, and
# the fused head.
#
#   tools/benchmarks/gpu.sh [FOLDER]        results go to FOLDER (default: $OUT, else gpu-results)
#
# Needs a python3 ($PYTHON) with torch for CUDA and its triton, megatron-core, numpy, pydantic, pyyaml, psutil,
# filelock, orjson, zstandard, rich, pytest and hypothesis; megadiff itself need not be installed, and
# nothing is downloaded. The FP8 parts also need Transformer Engine, installed or on PYTHONPATH; without it they are
# left out, and the table shows that.
#
# The parts run in the order of their value, each with a limit of its own and files of its own: NAME.log, NAME.state and
# some .json. It ends after GPU_SECONDS (default 560). After a part that fails or runs out of time the next one begins.
# Started again with the same FOLDER, it keeps the parts that ended well and runs the others; another commit starts
# anew, as does a working tree with changes. GPU_COMMIT names the version where there is no git. FOLDER/summary.txt has
# the table, updated after each part. GPU_REHEARSAL=1 tries every line on a CPU, at small sizes, in five minutes.
case ${1:-} in -h | --help) sed -n '/^# [A-Z]/,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;; esac
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
out=$(realpath -m "${1:-${OUT:-gpu-results}}")
mkdir -p "$out" || exit
commit=${GPU_COMMIT:-$(git describe --always --dirty --abbrev=40 2> /dev/null || echo unknown)}
commit+=${GPU_REHEARSAL:+, a rehearsal}
if [[ $(cat "$out/commit" 2> /dev/null) != "$commit" || $commit == *unknown* || $commit == *-dirty* ]]; then
  rm -f "$out"/*.{log,state} "$out"/{summary.txt,environment.json,head.json,training.json,fp8_quality.json}
fi
echo "$commit" > "$out/commit"
python=${PYTHON:-python3}
deadline=$((SECONDS + ${GPU_SECONDS:-560}))
export PYTHONPATH=$PWD/tools/benchmarks:$PWD${PYTHONPATH:+:$PYTHONPATH}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
names=() failures=0
shown='^\||TFLOP|TB/s|cuDNN|held-out|^(device|torch|transformer-engine|error:|SKIPPED|FAILED|ERROR)'
shown+='|(passed|failed|skipped|error).* in [0-9.]+'

summarise() {
  {
    echo "commit       $commit"
    for name in "${names[@]}"; do printf '%-12s %s\n' "$name" "$(cat "$out/$name.state")"; done
    for name in "${names[@]}"; do
      [[ -e $out/$name.log ]] && printf '\n%s\n' "$name" && grep -E "$shown" "$out/$name.log"
    done
  } > "$out/summary.txt"
}

part() { # NAME SECONDS COMMAND...; an argument LEFT becomes the part's limit minus 25 s, for starting and ending
  local name=$1 limit=$2 left=$((deadline - SECONDS)) began=$SECONDS code=0
  shift 2
  names+=("$name")
  if [[ $(cat "$out/$name.state" 2> /dev/null) == ok,* ]]; then
    echo "== $name: kept, it ended well before"
    return
  fi
  [[ ${GPU_REHEARSAL:-} ]] && ((limit *= 4)) # a CPU may be slow, and busy with other work
  ((limit = limit < left ? limit : left))
  if ((limit < 10)); then
    echo "not run, no time left" > "$out/$name.state"
  else
    echo "== $name (at most $limit s)"
    echo "CUT OFF" > "$out/$name.state"
    timeout --kill-after=5 "$limit" "${@/#LEFT/$((limit - 25))}" > "$out/$name.log" 2>&1 || code=$?
    tail -n 40 "$out/$name.log"
    case $code in
      0) echo "ok, $((SECONDS - began)) s" ;;
      124 | 137) echo "OUT OF TIME after $((SECONDS - began)) s" ;;
      *) echo "FAILED ($code) after $((SECONDS - began)) s" ;;
    esac > "$out/$name.state"
  fi
  ((failures += code != 0))
  summarise
}

environment=() training=(--seconds LEFT) head=() fp8=()
if [[ ${GPU_REHEARSAL:-} ]]; then
  export MEGADIFF_REHEARSE_GPU=1 CUDA_VISIBLE_DEVICES=
  environment=(--platform cpu)
  training=(--seconds LEFT --platform cpu --models tiny --steps 1 --seq-length 256)
  head=(--platform cpu --hidden 64 --vocab-size 512 --tokens 64 --plain-tokens 32 --rounds 1)
  fp8=(--platform cpu --steps 10 --part asyncio model.layers=1 model.hidden=32 model.heads=2 model.seq_length=32
    batch.global_batch_size=4 batch.micro_batch_size=2 eval.sequences=8)
fi
part environment 40 "$python" tools/benchmarks/gpu_environment.py --output "$out" "${environment[@]}"
part tests 150 "$python" -m pytest tests/gpu -p no:cacheprovider --override-ini=addopts= -q -rsfE --tb=short \
  --maxfail=20 --continue-on-collection-errors
part training 160 "$python" tools/benchmarks/gpu_training.py --output "$out" "${training[@]}"
part fp8 120 "$python" tools/benchmarks/gpu_fp8_quality.py --output "$out" "${fp8[@]}"
part head 80 "$python" tools/benchmarks/gpu_head.py --output "$out" "${head[@]}"
summarise
echo
cat "$out/summary.txt"
exit $((failures > 0))
