#!/usr/bin/env bash
# Heads and MLPs (When BERT Plays the Lottery): fine-tune, prune while 90 % of the score is left, and the good tickets beside random,
# bad and super ones; each is scored as it stands (pruned) and fine-tuned from the pre-trained weights (retrained).
# SEARCHES: s (heads and MLPs by importance), heads, mlps (these alone), m (weights by magnitude). Super tickets are of s.
# PROTOCOL: paper, or released: the released code's settings, in an OUTPUT of their own.
set -euo pipefail
: "${TASKS:=mnli qnli rte mrpc qqp sst2 cola stsb}" "${SEEDS:=1337 42 86 71 166}" "${SEARCHES:=s heads mlps m}"
: "${PROTOCOL:=paper}"
[ "$PROTOCOL" = paper ] || FLAGS="${FLAGS-} --protocol $PROTOCOL" OUTPUT=${OUTPUT:-runs_importance_$PROTOCOL}
: "${OUTPUT:=runs_importance}"
has_protocols=true
source "$(dirname "$0")/commands.sh"

of_random=() short=()
if [ "$PROTOCOL" = released ]; then
  of_random=(--random-size binomial) short=(--batch-size 16 --epochs 2)
fi

for task in $TASKS; do
  good=()
  declare -A dense=()
  for seed in $SEEDS; do
    for search in $SEARCHES; do
      searched $task $seed $search                   # full BERT, and the good ticket, pruned
      retrained 2 $task $seed
      ticket=$mask dense[$search-$seed]=$weights
      case $search in
        s)
          good+=("$ticket")
          derived ${task}_s random $seed "$ticket" --seed $seed "${of_random[@]}"
          pruned_and_retrained $task $seed
          retrained 3 $task $seed --init random
          derived ${task}_s bad $seed "$ticket" --seed $seed
          pruned_and_retrained $task $seed ;;
        m)
          derived ${task}_m random $seed "$ticket" --seed $seed
          pruned_and_retrained $task $seed "${short[@]}"
          derived ${task}_m bad $seed "$ticket" --weights "$weights"
          pruned_and_retrained $task $seed ;;
      esac
    done
  done
  [ ${#good[@]} -gt 1 ] || continue                  # super tickets need two seeds
  for seed in $SEEDS; do
    weights=${dense[s-$seed]}
    derived ${task}_s super '' "${good[@]}"
    pruned_and_retrained $task $seed
    derived ${task}_s super-bad '' "${good[@]}"
    pruned_and_retrained $task $seed
    derived ${task}_s super-random $seed "${good[@]}" --seed $seed
    pruned_and_retrained $task $seed
  done
done

finally "$PYTHON" scripts/tables.py "$OUTPUT" --table importance
