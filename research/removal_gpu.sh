#!/usr/bin/env bash
# On a CUDA machine that is at hand for minutes: what is missing of the removal table of the shipped model, by several
# processes on one GPU. FOLDER gets rows, table and plots.
# Usage: research/removal_gpu.sh FOLDER SECONDS [options of make_removal_table.py]
# PYTHON=... names the interpreter, DEVICE=cpu and PROCESSES=... try it elsewhere.
set -uo pipefail

out=${1:?usage: research/removal_gpu.sh FOLDER SECONDS [options of make_removal_table.py]}
seconds=${2:?usage: research/removal_gpu.sh FOLDER SECONDS [options of make_removal_table.py]}
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out/images" && out=$(cd "$out" && pwd)
cd "$root" || exit 1
PYTHONUNBUFFERED=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} timeout "$((seconds + 60))" "${PYTHON:-python3}" \
    research/make_removal_table.py --device "${DEVICE:-cuda}" --processes "${PROCESSES:-12}" --batch 200 \
    --seconds "$seconds" --docs "$out" "$@" >"$out/removal.txt" 2>&1
status=$?
echo "status $status after $SECONDS s; cells, table and plots are in $out"
exit "$status"
