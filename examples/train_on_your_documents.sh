#!/usr/bin/env bash
# Trains on your own documents, from lines that pair a query with what it should find (and, if you have them, with what
# it should not), in Tevatron's or FlagEmbedding's form. The last fifth of the lines is held out.
#
#     bash examples/train_on_your_documents.sh pairs.jsonl mine
set -euo pipefail
pairs=$1 name=$2

lines=$(wc -l < "$pairs")
mkdir -p "data/$name.pairs"
head -n $((lines * 4 / 5)) "$pairs" > "data/$name.pairs/train.jsonl"
tail -n +$((lines * 4 / 5 + 1)) "$pairs" > "data/$name.pairs/validation.jsonl"
python -m r3jax.convert data "data/$name.pairs/train.jsonl,data/$name.pairs/validation.jsonl" "data/$name"

# From scratch, on two cores. Add :qwen2_5_0_5b and --config.init_from=Qwen/Qwen2.5-0.5B-Instruct for a model that knows
# English already, and a GPU for it.
python -m r3jax.train --config=configs/rl.py --config.data.path="data/$name" --workdir="runs/$name" \
    --config.data.eval_splits="('validation',)"
python -m r3jax.encode "runs/$name" "data/$name" "vectors/$name"
python -m r3jax.search "vectors/$name" "$(head -n 1 "data/$name.pairs/validation.jsonl" |
    python -c 'import json, sys; print(json.load(sys.stdin)["query"])')"
