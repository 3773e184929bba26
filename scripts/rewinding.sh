#!/usr/bin/env bash
# Table 3: rewinding to a later step than the pre-trained weights, and standard pruning, which rewinds to none.
# REWIND: what to rewind to (shares of training, steps, none), beside 0.
set -euo pipefail
: "${TASKS:=mnli qqp stsb wnli qnli mrpc rte sst2 cola squad mlm}" "${SEEDS:=57 58 59 60 61}"
: "${REWIND:=5% 10% 20% 50% none}"
source "$(dirname "$0")/commands.sh"

for task in $TASKS; do
  for seed in $SEEDS; do
    imp $task $seed
    for rewind in $REWIND; do
      imp $task $seed --rewind $rewind
    done
  done
done

finally "$PYTHON" scripts/tables.py "$OUTPUT" --table 3
