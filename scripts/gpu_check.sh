#!/usr/bin/env bash
# Checks and measures the engine on a machine with one GPU; `scripts/gpu_check.sh --help` says how.
# Every part is a process with a limit of time. One that fails does not stop the others, but the exit status.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3 wheels='' previous=''
for word in "$@"; do
  case $previous in --python) python=$word ;; --wheels) wheels=$word ;; esac
  case $word in --python=*) python=${word#*=} ;; --wheels=*) wheels=${word#*=} ;; esac
  previous=$word
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
path=$root
if [ -n "$wheels" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl || exit 2
  path=$root:$work/site
fi
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH}
check=("$python" "$root/scripts/gpu_check.py")

for word in "$@"; do
  case $word in -h | --help) "${check[@]}" --help && exit ;; esac
done
plan=$("${check[@]}" plan "$@") || exit 2

status=0
while read -r name limit; do
  echo "== $name, at most $limit s"
  timeout --kill-after 5 "$limit" "${check[@]}" part "$name" "$@" --work "$work" </dev/null || {
    echo "FAILED $name: exit status $?"
    status=1
  }
done <<<"$plan"
"${check[@]}" report "$@" --work "$work" || status=1
exit $status
