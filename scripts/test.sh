#!/usr/bin/env bash
# Install the package and run its tests; arguments go to pytest (bash scripts/test.sh -k resume).
# Two tests run at a time, each on one thread; those that -m or --cluster choose run one by one.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

install dev
.venv/bin/ruff check .
.venv/bin/mypy
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
workers=2
case " $* " in *" -m "* | *" --cluster "*) workers=0 ;; esac
exec .venv/bin/python -m pytest -n $workers --dist worksteal "$@"
