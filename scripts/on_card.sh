#!/bin/sh
# All that a Hopper card is wanted for, in under 20 minutes of its time, the most telling first:
#   sh scripts/on_card.sh [FOLDER [STEP...]]    JSON and on_card.log in FOLDER (default docs/results); all steps, or
#                                               these: smoke numerics peers reruns sparse tiles
#   REHEARSE=1 sh scripts/on_card.sh [FOLDER]   on a CPU, before: collects the tests, compiles for an H100, and
#                                               writes the tile sizes that are worth timing to $COMPILED
# Each step has its own limit, so that one that hangs costs no more than that; the exit status counts failures.
set -u
OUT=${1:-docs/results}
[ $# -gt 0 ] && shift
STEPS=" $* "
PYTHON=${PYTHON:-python3}
COMPILED=${COMPILED:-docs/results/h100-compiled.json}
FAILED=0 RAN=0
mkdir -p "$OUT" "$(dirname "$COMPILED")"
export PYTHONPATH=. PYTHONUNBUFFERED=1

step() { # name, seconds, command...
    name=$1 limit=$2
    shift 2
    case $STEPS in "  " | *" $name "*) ;; *) return ;; esac
    RAN=$((RAN + 1))
    echo "== $name" | tee -a "$OUT/on_card.log"
    start=$(date +%s)
    timeout -k 10 "$limit" "$@" >"$OUT/on_card.step" 2>&1
    status=$?
    [ $status -eq 0 ] || FAILED=$((FAILED + 1))
    cat "$OUT/on_card.step" >>"$OUT/on_card.log"
    tail -n 3 "$OUT/on_card.step"
    rm -f "$OUT/on_card.step"
    echo "== $name: status $status, $(($(date +%s) - start)) s" | tee -a "$OUT/on_card.log"
}

# Neither warnings nor plug-ins that are missing or too many decide about a card; -v names the test that hangs.
tests() { # name, seconds, options of pytest...
    name=$1 limit=$2
    shift 2
    step "$name" "$limit" env XLA_PYTHON_CLIENT_PREALLOCATE=false "$PYTHON" -m pytest tests/test_mosaic_gpu.py \
        -m gpu -o addopts= -W default -p no:cacheprovider -p no:benchmark -v "$@"
}

if [ -n "${REHEARSE:-}" ]; then
    export JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1
    tests collect 120 --collect-only
    step compile 900 "$PYTHON" -m tests.aot_gpu "128 causal"
    step tiles 7200 "$PYTHON" scripts/tune.py tiles --rehearse --widths 128 64 --json "$COMPILED"
else
    nvidia-smi >>"$OUT/on_card.log" 2>&1 || { echo "no NVIDIA GPU" >&2; exit 2; }
    # Compiling takes most of the tests' time: several processes where pytest-xdist is installed.
    PARALLEL=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n 6")
    # A kernel that is wrong is not worth timing: numerics, poison and odd lengths first, without reruns.
    tests smoke 150 -x -k "float32 and 4096 and Causal"
    # shellcheck disable=SC2086 # two words or none
    tests numerics 300 $PARALLEL -k "not reruns"
    step peers 330 "$PYTHON" scripts/tune.py peers --widths 128 64 256 --lengths 4096 16384 --rounds 7 --json "$OUT/h100-attention.json"
    tests reruns 90 -k reruns
    step sparse 120 "$PYTHON" scripts/tune.py sparse --rounds 7 --json "$OUT/h100-sparse.json"
    step tiles 210 "$PYTHON" scripts/tune.py tiles --widths 128 64 --rounds 7 --compiled "$COMPILED" --json "$OUT/h100-tiles.json"
fi
[ "$RAN" -gt 0 ] || { echo "no such step:$STEPS" >&2; exit 2; }
echo "$FAILED of $RAN steps failed"
exit "$FAILED"
