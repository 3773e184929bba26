#!/usr/bin/env bash
# EarlyBERT: tickets drawn early in fine-tuning, beside the full BERT, random tickets, and the full BERT at the ticket's budget.
# HEADS_ONLY: if set, no neurons go; on the paper's seven tasks of GLUE.
# PROTOCOL: paper, or released: the released code's settings, in an OUTPUT of their own. The full BERT's settings are not released.
set -euo pipefail
: "${PROTOCOL:=paper}" "${HEADS_ONLY:=}" "${SEEDS:=42 43 44}"
[ -z "$HEADS_ONLY" ] || : "${TASKS:=mnli qnli qqp sst2 cola rte mrpc}"
: "${TASKS:=mnli qnli qqp sst2 squad}"
[ "$PROTOCOL" = paper ] || : "${OUTPUT:=runs_earlybert_$PROTOCOL}"
: "${OUTPUT:=runs_earlybert}"
has_protocols=true
source "$(dirname "$0")/commands.sh"

units=()
[ -z "$HEADS_ONLY" ] || units=(--neurons 0)
for task in $TASKS; do
  for seed in $SEEDS; do
    full_bert $task $seed
    early_bird $task $seed "${units[@]}"
    early_bird $task $seed "${units[@]}" --ticket random
    early_bird $task $seed "${units[@]}" --ticket full
  done
done

finally "$PYTHON" scripts/tables.py "$OUTPUT" --table earlybert
