#!/usr/bin/env bash
# MLM's tickets, which transfer: over sparsities, and found by rewinding to later steps (Question 3) and trained from there.
# SPARSITIES in percent; REWIND: later steps of MLM's training, as shares, at SPARSITY.
set -euo pipefail
: "${TASKS:=mnli qqp stsb wnli qnli mrpc rte sst2 cola squad}" "${SEEDS:=57 58 59}"
: "${SPARSITIES:=40 50 60 70 80 90}" "${SPARSITY:=70}" "${REWIND:=5% 10% 20% 50%}"
source "$(dirname "$0")/commands.sh"

for seed in $SEEDS; do
  imp mlm $seed
  for task in $TASKS; do
    imp $task $seed                                  # the full BERT of the task, and its own tickets
    for percent in $SPARSITIES; do
      ticket $percent mlm $seed
      given $task $seed "$mask"
    done
  done
  for rewind in $REWIND; do
    imp mlm $seed --rewind $rewind
    ticket $SPARSITY mlm $seed --rewind $rewind
    for task in $TASKS; do
      given $task $seed "$mask" --init "$directory/rewind.safetensors"
    done
  done
done

finally "$PYTHON" scripts/figures.py curves "$OUTPUT" --output "$OUTPUT/mlm.png"
