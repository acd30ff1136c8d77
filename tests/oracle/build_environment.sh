#!/usr/bin/env bash
# Makes an environment with torch for CPU: build_environment.sh FOLDER TORCH_REQUIREMENT [PYTHON] [REQUIREMENTS]
# REQUIREMENTS are those of the oracle tests by default.
set -euo pipefail
folder=$1 torch=$2 python=${3:-} requirements=${4:-$(dirname "$0")/requirements.txt}

works() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

if [ -z "$python" ]; then
    candidates=(python3.11)
    if command -v pyenv >/dev/null; then
        candidates+=("$(pyenv root)"/versions/3.11*/bin/python3.11)
    fi
    for candidate in "${candidates[@]}"; do
        if works "$candidate"; then
            python=$candidate
            break
        fi
    done
fi
if [ -z "$python" ]; then
    echo "oracle: no Python 3.11 with venv found; name another Python as ORACLE_PYTHON=..." >&2
    exit 1
fi

echo "making $folder with $python (over 1 GB)"
rm -rf "$folder"
"$python" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check -qq install)
# Torch first: if its CPU build cannot be had, nothing else is fetched.
"${pip[@]}" "$torch"
"${pip[@]}" "$torch" -r "$requirements"
touch "$folder/.ready"
