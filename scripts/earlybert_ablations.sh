#!/usr/bin/env bash
# EarlyBERT's trade-off and ablations on one task: heads by neurons that go; the penalties; neurons ranked by layer; the learning rate
# by epochs of the ticket's training; and a longer search, for the distances between its masks. Beside the full BERT.
# HEADS, NEURONS: fractions that go. LAMBDAS: of both penalties. RATES, EPOCHS: of the ticket's training. RECORD: epochs of the longer
# search, of the first seed.
set -euo pipefail
: "${TASKS:=qnli}" "${SEEDS:=42 43 44}" "${HEADS:=1/4 1/3 5/12 1/2}" "${NEURONS:=0.3 0.4 0.5}" "${LAMBDAS:=1e-4 1e-3 1e-2}"
: "${RATES:=2e-5 4e-5 6e-5 8e-5}" "${EPOCHS:=1 2}" "${RECORD:=2.5}" "${PROTOCOL:=paper}"
[ "$PROTOCOL" = paper ] || : "${OUTPUT:=runs_earlybert_$PROTOCOL}"
: "${OUTPUT:=runs_earlybert}"
has_protocols=true
source "$(dirname "$0")/commands.sh"

unless_preset() { # flag, its value in the preset, value, ...: sets `given` to the flags without which a run has another value
  local everywhere=" $FLAGS $GLUE_FLAGS $SQUAD_FLAGS $EARLY_FLAGS "
  everywhere=${everywhere//_/-}
  given=()
  while [ $# -gt 0 ]; do
    [[ $2 = "$3" && ! $everywhere =~ " $1"[\ =] ]] || given+=("$1" "$3")
    shift 3
  done
}

for task in $TASKS; do
  length=2 speed=4e-5 # of the preset
  [ $task != squad ] || length=3 speed=3e-5
  for seed in $SEEDS; do
    full_bert $task $seed
    for neurons in $NEURONS; do
      for heads in $HEADS; do
        unless_preset --heads 1/3 $heads --neurons 0.4 $neurons
        early_bird $task $seed "${given[@]}"
      done
      unless_preset --neurons 0.4 $neurons
      early_bird $task $seed "${given[@]}" --neuron-scope layer
    done
    for lambda in $LAMBDAS; do
      unless_preset --lambda-heads 1e-4 $lambda --lambda-neurons 1e-4 $lambda
      early_bird $task $seed "${given[@]}"
    done
    for epochs in $EPOCHS; do
      for rate in $RATES; do
        unless_preset --epochs $length $epochs --lr $speed $rate
        early_bird $task $seed "${given[@]}"
      done
    done
  done
  early_bird $task ${SEEDS%% *} --whole-search --record-epochs $RECORD
done

at_end "$PYTHON" scripts/figures.py distances "$OUTPUT" --output "$OUTPUT/distances.png"
at_end "$PYTHON" scripts/figures.py tradeoff "$OUTPUT" --output "$OUTPUT/tradeoff.png"
finally "$PYTHON" scripts/tables.py "$OUTPUT" --table earlybert
