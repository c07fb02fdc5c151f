#!/bin/sh
# Train the study's runs one after the other; a run that is finished is passed over, so the script may be repeated.
#
# Usage, from the top of the repository, once runs/mini-data is there (examples/scaling/README.md):
#     sh examples/adapt/run.sh llama
#     sh examples/adapt/run.sh qwen
set -e
cd "$(dirname "$0")/../.."
shape=${1:?give llama or qwen}

train() { # name setting...
    name=$1
    shift
    "${PYTHON:-python}" pretrain_dlm.py --config "examples/adapt/$shape.yaml" name="$shape-$name" "$@"
}

train autoregressive method.name=next_token schedule.steps=2000 checkpoint.every=2000 'eval.at_steps=[300,1000,2000]'
start="checkpoint.start_from=runs/adapt/$shape-autoregressive/checkpoints/step_00002000"
adapted="$start checkpoint.weights_only=true method.name=adaptation model.alignment=shifted"
for seed in 0 1 2; do
    train scratch-$seed seed=$seed
    train at-once-$seed seed=$seed $adapted
    train annealed-$seed seed=$seed $adapted method.anneal_steps=200
done
for seed in 0 1 2; do
    train joint-$seed seed=$seed $adapted method.next_token_fraction=0.2
done
