#!/usr/bin/env bash
# Figure 2: TRANSFER(source, target), the ticket of every task trained on every task, and the one-shot magnitude ticket.
# Same-task entries are levels of the runs that find the tickets.
# SPARSITY: in percent (default: 70). SOURCES, TARGETS: tasks (default: TASKS).
set -euo pipefail
: "${TASKS:=mnli qqp stsb wnli qnli mrpc rte sst2 cola squad mlm}" "${SEEDS:=57 58 59}" "${SPARSITY:=70}"
: "${SOURCES:=$TASKS}" "${TARGETS:=$TASKS}"
source "$(dirname "$0")/commands.sh"

for seed in $SEEDS; do
  for task in $SOURCES $TARGETS; do                  # the target's run trains its full BERT, the reference
    imp $task $seed
  done
  oneshot $SPARSITY magnitude $seed
  for target in $TARGETS; do
    given $target $seed "$mask"                      # pruning theta_0
  done
  for source in $SOURCES; do
    ticket $SPARSITY $source $seed
    for target in $TARGETS; do
      [ $source = $target ] || given $target $seed "$mask"
    done
  done
done

finally "$PYTHON" scripts/figures.py transfer "$OUTPUT" --sparsity "$SPARSITY" --output "$OUTPUT/transfer_$SPARSITY.png"
