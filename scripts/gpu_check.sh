#!/usr/bin/env bash
# Does it work on this machine's GPU, and how fast? No hub and no data are needed. Arguments: --quick, --device cpu, --help, ...
# PYTHON chooses the interpreter; the default is .venv's, where there is one. Nothing is installed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x "$here/.venv/bin/python" ]; then PYTHON=$here/.venv/bin/python; fi
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$here/scripts/gpu_check.py" "$@"
