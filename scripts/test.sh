#!/usr/bin/env bash
# Install the package and run its tests; arguments go to pytest (bash scripts/test.sh -k resume).
set -euo pipefail
source "$(dirname "$0")/environment.sh"

install dev
.venv/bin/ruff check .
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"
