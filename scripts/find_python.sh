#!/usr/bin/env bash
# Prints the interpreter to build with: the first of 3.12, 3.13, 3.11 that really runs (a pyenv shim may not).
set -u
pyenv_root=$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")
for version in 3.12 3.13 3.11; do
  for candidate in "python$version" "$pyenv_root"/versions/"$version".*/bin/python python3; do
    if "$candidate" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
      command -v "$candidate"
      exit 0
    fi
  done
done
echo "no Python 3.12, 3.13 or 3.11 found: install one, or call make PYTHON=/path/to/python" >&2
exit 1
