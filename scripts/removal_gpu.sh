#!/usr/bin/env bash
# On a CUDA machine that is at hand for minutes: the whole removal table of the shipped model, settings chosen anew, by
# several processes on one GPU. What is done when the time is up comes home, and a rerun with it goes on from there.
# Usage: scripts/removal_gpu.sh FOLDER SECONDS [options of make_removal_table.py]
# PYTHON=... names the interpreter, RUN=... a folder to go on in, DEVICE=cpu and PROCESSES=... try it elsewhere.
set -uo pipefail

out=${1:?usage: scripts/removal_gpu.sh FOLDER SECONDS [options of make_removal_table.py]}
seconds=${2:?usage: scripts/removal_gpu.sh FOLDER SECONDS [options of make_removal_table.py]}
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$root" || exit 1
run=${RUN:-$(mktemp -d)}
mkdir -p "$run/docs/images" "$run/cells"
if [ -e "$out/removal.tgz" ]; then tar xzf "$out/removal.tgz" -C "$run"; fi
PYTHONUNBUFFERED=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} timeout "$((seconds + 60))" "${PYTHON:-python3}" \
    scripts/make_removal_table.py --device "${DEVICE:-cuda}" --processes "${PROCESSES:-12}" --batch 200 \
    --seconds "$seconds" --folder "$run/cells" --docs "$run/docs" "$@" >"$out/removal.txt" 2>&1
status=$?
tar czf "$out/removal.tgz" -C "$run" .
echo "status $status after $SECONDS s; cells, table, JSON and plots are in $out/removal.tgz"
exit "$status"
