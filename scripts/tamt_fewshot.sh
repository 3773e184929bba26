#!/usr/bin/env bash
# Few examples: tickets of mask training (TAMT), IMP on MLM and one-shot pruning, and full BERT, trained on parts of the data.
# SEEDS: of the masks, the trainings and the examples drawn. SPARSITY: in percent. OBJECTIVES: of mask training.
# SIZES: numbers of examples, for all tasks (default: the paper's of each). INTERVAL, EVERY: as in tamt.sh.
# The tickets are found in OUTPUT, and trained in OUTPUT_fewshot.
set -euo pipefail
: "${TASKS:=mnli sst2 cola squad}" "${SEEDS:=1 2 3 4 5}" "${SPARSITY:=70}" "${SIZES:=}"
: "${OBJECTIVES:=mlm kd}" "${INTERVAL:=2792}" "${EVERY:=1000}"
: "${OUTPUT:=runs_tamt}" # not runs: there IMP on MLM has other settings
source "$(dirname "$0")/commands.sh"

declare -A sizes=([mnli]="1000 5000 10000 50000 100000" [sst2]="1000 5000 10000 30000" [cola]="1000 2000 5000"
  [squad]="1000 5000 10000 20000 40000")

for seed in $SEEDS; do
  masks=()
  oneshot $SPARSITY magnitude $seed "${covering[@]}"
  masks+=("$mask")
  imp_mlm $SPARSITY $seed $INTERVAL
  masks+=("$mask")
  for objective in $OBJECTIVES; do
    mask_training $SPARSITY $objective $seed
    masks+=("$mask")
  done
  for task in $TASKS; do
    wanted=${SIZES:-${sizes[$task]-}}
    [ -n "$wanted" ] || fail "the paper has no sizes for $task: set SIZES"
    for size in $wanted; do
      few=(--limit-train $size --limit-seed run --output-dir "${OUTPUT}_fewshot")
      if [ $size -le 1000 ] || [[ $task-$size = cola-2000 ]]; then
        few+=(--epochs 8)
      fi
      training $task $seed "${few[@]}" --levels 1    # full BERT
      emit 1 "${command[@]}"
      for mask in "${masks[@]}"; do
        given $task $seed "$mask" "${few[@]}"
      done
    done
  done
done

finally "$PYTHON" scripts/figures.py examples "$OUTPUT" "${OUTPUT}_fewshot" --output "$OUTPUT/tamt_fewshot.png"
