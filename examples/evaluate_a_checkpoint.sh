#!/usr/bin/env bash
# Evaluates a published checkpoint with and without reasoning, and shows every query's thought beside its hits.
#
#     bash examples/evaluate_a_checkpoint.sh published/rl-tiny data/tldr-commands unseen
set -euo pipefail
model=$1 data=$2 split=$3
out=evaluation/$(basename "$model")

python -m r3jax.doctor "$model" || echo "the doctor's findings above may explain the figures below"
python -m r3jax.evaluate "$model" --data="$data" --split="$split" --out="$out"
python -m r3jax.inspect "$out"
