#!/usr/bin/env bash
# Does the package work on this machine's GPU, and how fast? Needs neither hub nor data, and installs nothing.
#
#   bash scripts/gpu_check.sh            bench.py on random tokens, then the GPU's tests
#   bash scripts/gpu_check.sh --quick    fewer of both
#
# PYTHON: the interpreter (default: .venv's if there is one). MINUTES: the time limit (default: 15; with --quick 5).
# Writes tests.log and bench.json to runs/gpu_check/. Exit code: 0 if all passed, 1 if not, 2 if nothing could be checked.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=$PWD/runs/gpu_check
stop() { echo "gpu_check.sh: $1" >&2; exit 2; }

tests=() turns=5 minutes=15
case "$*" in
  "") ;;
  --quick) tests=(-k "killed or (steps and fp16) or masks or gradients or kernels") turns=2 minutes=5 ;;
  --help) exec sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" ;;
  *) stop "unknown arguments: $*; there is --quick" ;;
esac
minutes=${MINUTES:-$minutes}

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x "$here/.venv/bin/python" ]; then PYTHON=$here/.venv/bin/python; fi
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -c "import torch, sys; sys.exit(not torch.cuda.is_available())" 2>/dev/null || stop "torch sees no GPU, or is missing ($PYTHON)"
"$PYTHON" -c "import pytest" 2>/dev/null || stop "the tests need pytest: $PYTHON -m pip install -e '$here[dev]'"

trap 'exit 130' INT
mkdir -p "$output"
failed=0
within() { # a command, for the rest of the time limit
  local left=$((60 * minutes - SECONDS))
  if [ $left -le 0 ]; then echo "gpu_check.sh: no time left for ${*:2}" >&2; return 1; fi
  timeout --foreground -s INT -k 20 $left "$@" # pytest then still prints what failed
}
cd "$here" || exit 2
within "$PYTHON" scripts/bench.py --model random --tasks mnli --turns "$turns" --json "$output/bench.json" || failed=1
within "$PYTHON" -m pytest -m cuda -vv --durations=0 "${tests[@]}" tests/kernels tests/gpu 2>&1 | tee "$output/tests.log" || failed=1
exit $failed
