#!/usr/bin/env bash
# Table 2: the highest sparsity with winning tickets, compared with random pruning, random weights and shuffled weights.
# Figure 11, every task over all sparsities, is drawn from the same runs.
# SPARSITY: sparsity of the three controls, in percent (default: the paper's for each task).
set -euo pipefail
: "${TASKS:=mnli qqp stsb wnli qnli mrpc rte sst2 cola squad mlm}" "${SEEDS:=57 58 59 60 61}" "${SPARSITY:=}"
source "$(dirname "$0")/commands.sh"

declare -A published=(
  [mnli]=70 [qqp]=90 [stsb]=50 [wnli]=90 [qnli]=70 [mrpc]=50 [rte]=60 [sst2]=60 [cola]=50 [squad]=40 [mlm]=70
)

for task in $TASKS; do
  for seed in $SEEDS; do
    percent=${SPARSITY:-${published[$task]}}
    imp $task $seed                                  # full BERT, and f(x, m_IMP * theta_0)
    oneshot $percent random $seed
    given $task $seed "$mask"                        # f(x, m_RP * theta_0)
    ticket $percent $task $seed
    given $task $seed "$mask" --init random          # f(x, m_IMP * theta_0')
    perturbed shuffled $seed --shuffle entries
    given $task $seed "$mask" --init "$weights"      # f(x, m_IMP * theta_0'')
  done
done

finally "$PYTHON" scripts/tables.py "$OUTPUT" --table 2
