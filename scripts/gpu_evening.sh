#!/usr/bin/env bash
# On a CUDA machine that is at hand for minutes, the most telling part first: the tests of tests/gpu; the bench at
# CausVid's true size with both attention kernels, compiled and not; the removal table of the shipped model; training
# steps of the shipped model. Results, a log and one JSON file a bench are in the folder. What is not installed is
# skipped; every step has its time limit, so that the whole ends within 9 minutes.
# Usage: scripts/gpu_evening.sh [FOLDER] [tests] [sdpa] [xformers] [compiled] [removal] [training]
# FOLDER is $OUT where none is given; without names all steps but training, which is asked for by name.
# PYTHON=... names the interpreter, SECONDS_LEFT=... another limit of the whole, TRAIN_OPTIONS=... those of
# research/train_sprites.py (another --preset, --continue, --tune), RUN=... a folder to resume a training in.
set -uo pipefail

usage="usage: scripts/gpu_evening.sh FOLDER [tests] [sdpa] [xformers] [compiled] [removal] [training]"
out=${1:-${OUT:?$usage}}
if [ $# -gt 0 ]; then shift; fi
wanted=" ${*:-tests sdpa xformers compiled removal} "
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$root" || exit 1
log=$out/log.txt
: >"$log"

python=${PYTHON:-}
if [ -z "$python" ]; then
    if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi
export PYTHONUNBUFFERED=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
deadline=$((SECONDS + ${SECONDS_LEFT:-525}))
failed=0

say() { echo "== $*" | tee -a "$log"; }

# step NAME SECONDS COMMAND...: at most SECONDS, less where the whole script's time is nearly up.
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) begin=$SECONDS status
    shift 2
    if [ "$left" -lt 20 ]; then say "$name: skipped, no time left"; return 0; fi
    if [ "$left" -lt "$limit" ]; then limit=$left; fi
    say "$name: $*"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.txt" >>"$log"
    status=${PIPESTATUS[0]}
    case $status in
        0) say "$name: done in $((SECONDS - begin)) s" ;;
        124 | 137) say "$name: stopped at its limit of $limit s"; failed=1 ;;
        *) say "$name: failed with status $status"; failed=1; tail -n 15 "$out/$name.txt" ;;
    esac
    # The bench's last line is its JSON object.
    if [ "$status" -eq 0 ] && [[ $name == bench-* ]]; then tail -n 1 "$out/$name.txt" >"$out/$name.json"; fi
}

has() { "$python" -c "import $1" >/dev/null 2>&1; }

if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' >>"$log" 2>&1; then
    say "no CUDA device, or no torch, in $python: nothing to measure"
    exit 0
fi
for package in diffusers einops rich typer pydantic yaml; do
    if ! has "$package"; then say "$package is not installed in $python: nothing to measure"; exit 0; fi
done
"$python" -c 'import torch, diffusers; print(torch.__version__, diffusers.__version__, torch.cuda.get_device_name())' |
    tee -a "$log"
if command -v nvidia-smi >/dev/null; then nvidia-smi >>"$log" 2>&1; fi

wants() { [[ $wanted == *" $1 "* ]]; }

true_size=(
    "$python" -c 'from nasa_video.cli import main; main()' bench
    --model causvid --random-weights --width 832 --height 480 --dtype bfloat16 --device cuda --json
)

if wants tests; then
    if has pytest; then
        step tests-gpu 150 "$python" -m pytest -m gpu -p no:cacheprovider tests/gpu
    else
        say "pytest is not installed: tests/gpu skipped"
    fi
fi
if wants sdpa; then step bench-sdpa 150 "${true_size[@]}" --chunks 7 --repeats 1 --decode; fi
if wants xformers; then
    if has xformers.ops; then
        step bench-xformers 100 "${true_size[@]}" --chunks 7 --repeats 1 --attention xformers --methods none-folded,nasa-folded,nasa-padded,nag
    else
        say "xformers is not installed: its bench and tests are skipped"
    fi
fi
# A compiled graph unrolls every layer, and a method takes about six of them (empty cache, first chunk, growing history),
# so compiling is measured on a model cut to 2 layers, beside the same model uncompiled.
cut=(--chunks 7 --repeats 5 --layers 2 --methods nasa-folded)
if wants compiled; then
    if has triton; then
        step bench-cut 60 "${true_size[@]}" "${cut[@]}"
        step bench-cut-compiled 120 "${true_size[@]}" "${cut[@]}" --compile
    else
        say "triton is not installed: the compiled bench is skipped"
    fi
fi
if wants removal; then
    mkdir -p "$out/images"
    step removal 300 "$python" research/make_removal_table.py --device cuda --processes "${PROCESSES:-12}" --batch 200 \
        --seconds 240 --docs "$out"
fi
if wants training; then
    run=${RUN:-$out/training}
    weights=$run/weights
    mkdir -p "$run"
    if [ ! -e "$weights" ]; then cp -r nasa_video/sprites/weights "$weights"; fi
    read -r -a options <<<"${TRAIN_OPTIONS:-}"
    # weights, curves and sheets are written as the training goes: what is there at the limit is there to bring home
    step training 420 "$python" research/train_sprites.py --preset sprites-gpu --device cuda --folder "$run/run" \
        --weights "$weights" --keep autoencoder,detector --until opening "${options[@]}"
fi
say "all written to $out ($SECONDS s)"
exit "$failed"
