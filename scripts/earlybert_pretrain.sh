#!/usr/bin/env bash
# EarlyBERT in pre-training: the search, draw and training of a slim network by MLM, its dense twin, and the twin at the slim
# network's budget; then all of them fine-tuned.
# INIT: random (from scratch), or pretrained.
set -euo pipefail
: "${TASKS:=mnli qnli qqp sst2 cola rte mrpc squad}" "${SEEDS:=42 43 44}" "${INIT:=random}"
: "${OUTPUT:=runs_earlybert_pretrain}" # not runs_earlybert: there the same tasks have another model
source "$(dirname "$0")/commands.sh"

fine_tuned() { # seed, flags ...: train the network `model` on each task
  local task MODEL=$model
  for task in $TASKS; do
    training $task "$@"
    emit 2 "${command[@]}"
  done
}

for seed in $SEEDS; do
  full_bert mlm $seed --init "$INIT" --keep-models
  run_directory
  model=$directory/level_00/model
  fine_tuned $seed --levels 1
  early_bird mlm $seed --init "$INIT" --keep-models
  run_directory
  model=$directory/level_01/model
  fine_tuned $seed --mask "$directory/level_00/mask.safetensors" --execution slim
  early_bird mlm $seed --init "$INIT" --ticket full --keep-models
  run_directory
  model=$directory/level_01/model
  fine_tuned $seed --levels 1
done

finally "$PYTHON" scripts/tables.py "$OUTPUT" --table earlybert
