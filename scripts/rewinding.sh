#!/usr/bin/env bash
# Table 3: rewinding to later steps than the pre-trained weights, and standard pruning, which does not rewind.
# REWIND: values of --rewind other than 0: parts of training (5%), steps, or none.
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
