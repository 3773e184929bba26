#!/usr/bin/env bash
# The cost of the search: tickets of mask training (TAMT) after as many steps as IMP on MLM takes with short and long levels.
# The masks of mask training are saved on the way of the runs of tamt.sh.
# SEEDS: of the masks. RUNS: trainings of each ticket on each task, with seeds 10 apart. SPARSITIES: in percent.
# INTERVALS: steps of a level of IMP. OBJECTIVES: of mask training; its masks are at the nearest multiples of EVERY.
# INTERVAL: the one that mask training ends with.
set -euo pipefail
: "${TASKS:=cola mnli sst2 stsb squad}" "${SEEDS:=1 2 3}" "${RUNS:=3}" "${SPARSITIES:=60 70 80}"
: "${INTERVALS:=200 300 500 900 2792}" "${OBJECTIVES:=mlm kd}" "${INTERVAL:=2792}" "${EVERY:=1000}"
: "${OUTPUT:=runs_tamt}" # not runs: there IMP on MLM has other settings
source "$(dirname "$0")/commands.sh"

for seed in $SEEDS; do
  for percent in $SPARSITIES; do
    for interval in $INTERVALS; do
      imp_mlm $percent $seed $interval
      train_ticket $seed
      imp_steps $percent $interval
      at=$steps
      for objective in $OBJECTIVES; do
        mask_training $percent $objective $seed $at
        train_ticket $seed
      done
    done
  done
done

finally "$PYTHON" scripts/tables.py "$OUTPUT" --table tamt
