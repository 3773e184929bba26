#!/usr/bin/env bash
# Mask overlap between the tickets of different tasks, compared with the overlap expected by chance.
# SPARSITY: in percent (default: 70). The figure shows the first seed.
set -euo pipefail
: "${TASKS:=mnli qqp stsb wnli qnli mrpc rte sst2 cola squad mlm}" "${SEEDS:=57}" "${SPARSITY:=70}"
source "$(dirname "$0")/commands.sh"

masks=()
for seed in $SEEDS; do
  for task in $TASKS; do
    imp $task $seed
    ticket $SPARSITY $task $seed
    [ $seed != "${SEEDS%% *}" ] || masks+=("$directory")
  done
done

finally "$PYTHON" scripts/compare.py "${masks[@]}" --level $((SPARSITY / STEP)) --output "$OUTPUT/similarity_$SPARSITY.png"
