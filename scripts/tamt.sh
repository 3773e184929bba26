#!/usr/bin/env bash
# Mask training (TAMT): tickets over sparsities by its three objectives, beside IMP on MLM, one-shot and random pruning of the same
# 74 matrices; and the losses of each ticket, against its scores.
# SEEDS: of the masks. RUNS: trainings of each ticket on each task, with seeds 10 apart. SPARSITIES: in percent.
# OBJECTIVES: of mask training. STEPS: also masks saved on the way, at these steps (1000 2000 3000 5000 10000).
# INTERVAL: steps of a level of IMP, and so of mask training, to the nearest multiple of EVERY.
set -euo pipefail
: "${TASKS:=cola mnli mrpc rte sst2 stsb squad}" "${SEEDS:=1 2 3}" "${RUNS:=3}" "${SPARSITIES:=50 60 70 80}"
: "${OBJECTIVES:=mlm kd mlm+kd}" "${STEPS:=}" "${INTERVAL:=2792}" "${EVERY:=1000}"
: "${OUTPUT:=runs_tamt}" # not runs: there IMP on MLM has other settings
source "$(dirname "$0")/commands.sh"

for seed in $SEEDS; do
  for task in $TASKS; do
    for ((i = 0; i < RUNS; i++)); do
      training $task $((seed + 10 * i)) --levels 1   # full BERT
      emit 1 "${command[@]}"
    done
  done
  for percent in $SPARSITIES; do
    oneshot $percent magnitude $seed "${covering[@]}"
    train_ticket $seed
    score ${SEEDS%% *}                               # the same mask for all seeds
    oneshot $percent random $seed "${covering[@]}"
    train_ticket $seed
    score $seed
    imp_mlm $percent $seed $INTERVAL
    train_ticket $seed
    score $seed
    for objective in $OBJECTIVES; do
      for step in ticket $STEPS; do
        mask_training $percent $objective $seed ${step#ticket}
        [ $step = ticket ] || [ $step -lt $steps ] || continue
        train_ticket $seed
        score $seed
      done
    done
  done
done

panels="$TASKS mlm_loss kd_loss"
at_end "$PYTHON" scripts/figures.py distance "$OUTPUT" --output "$OUTPUT/tamt_distance.png"
at_end "$PYTHON" scripts/figures.py losses "$OUTPUT" --tasks "$panels" --output "$OUTPUT/tamt_losses.png"
finally "$PYTHON" scripts/figures.py curves "$OUTPUT" --tasks "$panels" --title "Mask training" --output "$OUTPUT/tamt.png"
