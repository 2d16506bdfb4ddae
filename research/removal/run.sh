#!/bin/bash
# Removal distillation from the data to a measured student, in one call: research/removal/run.sh [ITERATIONS] [RANKS]
# Every stage goes on where it stopped. REMOVAL_FOLDER is where everything is kept (runs/removal), REMOVAL_DEVICE
# cpu or cuda. On two CPU cores: clips and pairs 6 minutes, reader 2, bank 15, training 3 s an iteration at best.
set -e
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE GLIBC_TUNABLES=glibc.malloc.hugetlb=1
export MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=200000000
PYTHON=${PYTHON:-python} HERE=research/removal ITERATIONS=${1:-1500} RANKS=${2:-1}
FOLDER=${REMOVAL_FOLDER:-runs/removal}
mkdir -p "$FOLDER/student"
"$PYTHON" $HERE/clips.py 36
[ -f "$FOLDER/reader.pt" ] || "$PYTHON" $HERE/reader.py 1300 36
"$PYTHON" $HERE/pairs.py 0 36
"$PYTHON" $HERE/bank.py 40 0
rm -f "$FOLDER/student/team"
for ((rank = RANKS - 1; rank > 0; rank--)); do
    "$PYTHON" $HERE/train.py "$FOLDER/student" "$ITERATIONS" --ranks "$RANKS" --rank $rank &
done
"$PYTHON" $HERE/train.py "$FOLDER/student" "$ITERATIONS" --ranks "$RANKS" --rank 0
wait
"$PYTHON" $HERE/evalw.py student "$FOLDER/student/student.safetensors" --kind short middling full
