#!/usr/bin/env bash
# One-shot pruning compared with iterative pruning: theta_0 pruned once, by magnitude and at random, over all sparsities.
# SPARSITIES: in percent.
set -euo pipefail
: "${TASKS:=mnli qqp stsb wnli qnli mrpc rte sst2 cola squad mlm}" "${SEEDS:=57 58 59}"
: "${SPARSITIES:=10 20 30 40 50 60 70 80 90}"
source "$(dirname "$0")/commands.sh"

for task in $TASKS; do
  for seed in $SEEDS; do
    imp $task $seed
    for percent in $SPARSITIES; do
      for method in magnitude random; do
        oneshot $percent $method $seed
        given $task $seed "$mask"
      done
    done
  done
done

finally "$PYTHON" scripts/figures.py curves "$OUTPUT" --output "$OUTPUT/oneshot.png"
