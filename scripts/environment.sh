# Sourced by demo.sh and test.sh: makes .venv with the package installed, or uses an existing one.
# PYTHON: the interpreter. TORCH: the torch to install (default: the version of the last test run). TRANSFORMERS: the
# transformers to install (default: the newest that the package supports).

cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "$0: $*" >&2; exit 1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer is needed; found $(python3 --version 2>&1 || echo none). Name one: PYTHON=/path/to/python3.12 bash $0"
}

install() { # extras
  local python stamp
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    "$python" -m venv .venv ||
      { rm -rf .venv; fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; }
  fi
  stamp=.venv/installed-$1-$( (echo "${TORCH:-} ${TRANSFORMERS:-}"; cat pyproject.toml scripts/environment.sh) | cksum | cut -d' ' -f1)
  if [ ! -e "$stamp" ]; then
    echo "installing into $PWD/.venv ..."
    .venv/bin/python -m pip install -q --disable-pip-version-check "${TORCH:-torch==2.13.0}" &&
      .venv/bin/python -m pip install -q --disable-pip-version-check -e ".[$1]" ${TRANSFORMERS:+"$TRANSFORMERS"} ||
      fail "the installation failed (see above). A package registry must be reachable; the same command tries again."
    rm -f .venv/installed-"$1"-*
    touch "$stamp"
  fi
}
