#!/usr/bin/env bash
# How tickets depend on the pre-trained weights: shuffles, and noise of growing strength, as in the released code.
# NOISE: in units of the standard deviation of the weights. SHUFFLES: entries, matrices, layers. SPARSITY: in percent.
set -euo pipefail
: "${TASKS:=mnli qqp stsb wnli qnli mrpc rte sst2 cola squad mlm}" "${SEEDS:=57 58 59}" "${SPARSITY:=50}"
: "${SHUFFLES:=entries matrices layers}" "${NOISE:=0.01 0.02 0.05 0.1 0.2 0.5 1}"
source "$(dirname "$0")/commands.sh"

for seed in $SEEDS; do
  for task in $TASKS; do
    imp $task $seed
    ticket $SPARSITY $task $seed
    for shuffle in $SHUFFLES; do
      [ $shuffle = entries ] && name=shuffled || name=$shuffle
      perturbed $name $seed --shuffle $shuffle
      given $task $seed "$mask" --init "$weights"
    done
    for noise in $NOISE; do
      perturbed noise_$noise $seed --noise $noise
      given $task $seed "$mask" --init "$weights"
    done
  done
done

finally "$PYTHON" scripts/tables.py "$OUTPUT" --table weights
