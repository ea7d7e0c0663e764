#!/usr/bin/env bash
# Checks and measures the engine on a machine with one GPU; `scripts/gpu_check.sh --help` says how.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3 previous=''
for word in "$@"; do
  if [ "$previous" = --python ]; then python=$word; fi
  case $word in --python=*) python=${word#*=} ;; esac
  previous=$word
done

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "$python" "$root/scripts/gpu_check.py" "$@"
