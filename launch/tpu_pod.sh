#!/usr/bin/env bash
# From this machine to a finished run on a Cloud TPU slice: launch/pod/ does it. See docs/tpu.md.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P) || exit 1
# What is named relative to here is looked for here.
[[ ${PYTHON:-} != */* ]] || PYTHON=$(cd "${PYTHON%/*}/" && pwd)/${PYTHON##*/} || exit 1
cd "$ROOT" || exit 1
for python in python3 "$ROOT/.venv/bin/python"; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    exec "$python" -m launch.pod "$@"
  fi
done
printf 'error: no Python 3.11 or newer found as python3; install one, or run make setup\n' >&2
exit 2
