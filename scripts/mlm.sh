#!/usr/bin/env bash
# Transfer of MLM tickets: over sparsities, and found by rewinding to a later step and trained from its weights (Question 3).
# SPARSITIES: in percent. REWIND: the later steps, as parts of MLM's training, at SPARSITY (percent).
set -euo pipefail
: "${TASKS:=mnli qqp stsb wnli qnli mrpc rte sst2 cola squad}" "${SEEDS:=57 58 59}"
: "${SPARSITIES:=40 50 60 70 80 90}" "${SPARSITY:=70}" "${REWIND:=5% 10% 20% 50%}"
source "$(dirname "$0")/commands.sh"

for seed in $SEEDS; do
  imp mlm $seed
  for task in $TASKS; do
    imp $task $seed                                  # the task's full BERT and own tickets
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
