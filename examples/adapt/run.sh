#!/bin/sh
# Train the study's runs one after the other; a run that is finished is passed over, so the script may be repeated.
#
# Usage, from the top of the repository, once runs/mini-data is there (examples/scaling/README.md):
#     sh examples/adapt/run.sh
set -e
cd "$(dirname "$0")/../.."

train() { # shape name setting...
    shape=$1 name=$2
    shift 2
    "${PYTHON:-python}" pretrain_dlm.py --config "examples/adapt/$shape.yaml" name="$shape-$name" "$@"
}

for seed in 0 1 2; do
    for shape in llama qwen; do
        train $shape autoregressive method.name=next_token schedule.steps=2000 checkpoint.every=2000 \
            'eval.at_steps=[300,1000,2000]'
        start="checkpoint.start_from=runs/adapt/$shape-autoregressive/checkpoints/step_00002000"
        adapted="$start checkpoint.weights_only=true method.name=adaptation model.alignment=shifted"
        train $shape scratch-$seed seed=$seed
        train $shape at-once-$seed seed=$seed $adapted
        train $shape annealed-$seed seed=$seed $adapted method.anneal_steps=200
        train $shape joint-$seed seed=$seed $adapted method.next_token_fraction=0.2
    done
done
