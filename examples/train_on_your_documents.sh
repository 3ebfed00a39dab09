#!/usr/bin/env bash
# Trains on your own documents, from lines that pair a query with what it should find (and, if you have them, with what
# it should not), in Tevatron's or FlagEmbedding's form. Every tenth line validates, and every tenth is held out.
#
#     bash examples/train_on_your_documents.sh pairs.jsonl mine
set -euo pipefail
pairs=$1 name=$2
parts=data/$name.pairs

mkdir -p "$parts"
awk -v to="$parts" '{ print > (to "/" (NR % 10 == 0 ? "validation" : NR % 10 == 5 ? "test" : "train") ".jsonl") }' "$pairs"
python -m r3jax.convert data "$parts/train.jsonl,$parts/validation.jsonl,$parts/test.jsonl" "data/$name"

# From scratch, on two cores. Add :qwen2_5_0_5b and --config.init_from=Qwen/Qwen2.5-0.5B-Instruct for a model that knows
# English already, and a GPU for it.
python -m r3jax.train --config=configs/rl.py --config.data.path="data/$name" --config.data.eval_splits=test \
    --workdir="runs/$name"
python -m r3jax.inspect "runs/$name"
python -m r3jax.encode "runs/$name" "data/$name" "vectors/$name"
