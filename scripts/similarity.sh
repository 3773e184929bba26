#!/usr/bin/env bash
# Mask similarity between tasks: the overlap of the tickets that the tasks find, beside what chance would give.
# SPARSITY in percent; the picture is of the first seed.
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

finally "$PYTHON" -m bert_tickets.masking.similarity "${masks[@]}" --level $((SPARSITY / STEP)) --output "$OUTPUT/similarity_$SPARSITY.png"
