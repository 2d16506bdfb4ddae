#!/usr/bin/env bash
# On a CUDA machine that is at hand for minutes: trains the shipped model with the package's autoencoder and detector, and
# keeps what is worth bringing home (weights in float16, curves, contact sheets, a log) up to date in a folder.
# Usage: research/train_gpu.sh FOLDER SECONDS [options of train_sprites.py]
# PYTHON=... names the interpreter, RUN=... a folder to go on in, or with parts in its run/ that need not be made anew.
# What comes home goes into nasa_video/sprites/weights; the card is measured there, on any machine.
set -uo pipefail

out=${1:?usage: research/train_gpu.sh FOLDER SECONDS [options of train_sprites.py]}
seconds=${2:?usage: research/train_gpu.sh FOLDER SECONDS [options of train_sprites.py]}
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
run=${RUN:-$(mktemp -d)}
mkdir -p "$run"
weights=$run/weights
if [ ! -e "$weights" ]; then cp -r nasa_video/sprites/weights "$weights"; fi

bring_home() {
    local name=student
    if [ -e "$run/run/opening.jsonl" ]; then name=opening; fi # the student of before stays beside it
    cp "$weights/transformer/diffusion_pytorch_model.safetensors" "$out/$name.safetensors"
    cp "$weights/teacher/transformer/diffusion_pytorch_model.safetensors" "$out/teacher.safetensors"
    tar czf "$out/run.tgz" -C "$run" --exclude='*.pt' --exclude='*.safetensors' --exclude=clips --exclude=short-clips .
}

while sleep 5; do bring_home; done 2>/dev/null &
watcher=$!
PYTHONUNBUFFERED=1 timeout "$seconds" "$python" research/train_sprites.py --preset sprites-gpu --device cuda \
    --folder "$run/run" --weights "$weights" --keep autoencoder,detector --until opening "$@" >"$out/train.txt" 2>&1
status=$?
kill "$watcher"
bring_home
echo "status $status after $SECONDS s; weights, curves and sheets are in $out"
exit "$status"
