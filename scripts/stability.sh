#!/usr/bin/env bash
# The stability of heads and MLPs over seeds and tasks (When BERT Plays the Lottery): searches, heat maps of what they keep, and the
# agreement of their masks. The searches are those of importance.sh. The table needs pip install -e '.[stability]'.
# SEARCHES: as in importance.sh. PROTOCOL: paper, or released.
# LONGER: if set, also the bad tickets of s, fine-tuned for that many epochs (6 in the paper), beside those of importance.sh.
set -euo pipefail
: "${TASKS:=mnli qnli rte mrpc qqp sst2 cola stsb}" "${SEEDS:=1337 42 86 71 166}" "${SEARCHES:=s heads mlps m}" "${LONGER:=}"
: "${PROTOCOL:=paper}"
[ "$PROTOCOL" = paper ] || FLAGS="${FLAGS-} --protocol $PROTOCOL" OUTPUT=${OUTPUT:-runs_importance_$PROTOCOL}
: "${OUTPUT:=runs_importance}"
has_protocols=true
source "$(dirname "$0")/commands.sh"

for task in $TASKS; do
  for seed in $SEEDS; do
    for search in $SEARCHES; do
      searched $task $seed $search
      if [ -n "$LONGER" ] && [ $search = s ]; then
        derived ${task}_s bad $seed "$mask" --seed $seed
        pruned_and_retrained $task $seed
        retrained 3 $task $seed --epochs "$LONGER"
      fi
    done
  done
done

declare -A methods=([s]=importance [heads]="importance (units heads)" [mlps]="importance (units mlps)" [m]=guarded_magnitude)
for search in $SEARCHES; do
  at_end "$PYTHON" scripts/figures.py survival "$OUTPUT" --method "${methods[$search]}" --output "$OUTPUT/survival_$search.png"
done
[ -z "$LONGER" ] || at_end "$PYTHON" scripts/tables.py "$OUTPUT" --table importance
finally "$PYTHON" scripts/tables.py "$OUTPUT" --table stability
