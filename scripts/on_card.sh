#!/bin/sh
# All that a Hopper card is wanted for, in under 20 minutes of its time, the most telling first:
#   sh scripts/on_card.sh [FOLDER [STEP...]]    JSON and on_card.log in FOLDER (default docs/results); all steps, or
#                                               these: smoke numerics peers reruns sparse tiles
#   REHEARSE=1 sh scripts/on_card.sh [FOLDER [STEP...]]
#                                               on a CPU, before (default build/rehearsal): collect peers sparse
#                                               compile tiles. It collects the tests, runs the benchmarks' command
#                                               lines at tiny sizes, compiles for an H100, and writes the tile sizes
#                                               that are worth timing to $COMPILED
# Each step has its own limit, so that one that hangs costs no more than that; the exit status counts failures.
set -u
if [ -n "${REHEARSE:-}" ]; then
    OUT=${1:-build/rehearsal} CARD=rehearsal SIZES="--lengths 64 --tokens 64 --rounds 1"
else
    OUT=${1:-docs/results} CARD=h100 SIZES="--tokens 16384 --rounds 7"
fi
[ $# -gt 0 ] && shift
STEPS=" $* "
PYTHON=${PYTHON:-python3}
COMPILED=${COMPILED:-docs/results/h100-compiled.json}
FAILED=0 RAN=0
mkdir -p "$OUT" "$(dirname "$COMPILED")"
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

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

# JAX leaves torch its memory. Nothing is begun after --seconds, and FlexAttention's compiler, which takes half a
# minute, then still ends within the limit.
attention() { # name, seconds, JSON, options of benchmark.py...
    name=$1 limit=$2 json=$3
    shift 3
    # shellcheck disable=SC2086 # SIZES are words; the last --lengths counts
    step "$name" "$limit" env XLA_PYTHON_CLIENT_PREALLOCATE=false "$PYTHON" scripts/benchmark.py attention "$@" \
        --heads 16 --seconds $((limit - 50)) --json "$OUT/$json" $SIZES
}

# Without a mask and causal: what every peer can do.
peers() {
    attention peers 330 "$CARD-attention.json" --masks "Full()" "Causal()" --widths 128 64 256 --lengths 4096 16384
}

# Without a mask first: what a live block takes there is what the others are compared with.
sparse() {
    attention sparse 170 "$CARD-sparse.json" --widths 128 --lengths 16384 --masks "Full()" "Causal()" \
        "SlidingWindow(1024)" "SlidingWindow(4096)" "Chunked(2048)" "BigBird(128, 3, 1, 3) & Causal()" \
        "(SlidingWindow(1024) | Sinks(64)) & Causal()"
}

if [ -n "${REHEARSE:-}" ]; then
    export JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1
    tests collect 120 --collect-only
    peers
    sparse
    step compile 900 "$PYTHON" -m tests.aot_gpu "128 causal"
    step tiles 7200 "$PYTHON" scripts/tune.py tiles --rehearse --widths 128 64 --json "$COMPILED"
else
    nvidia-smi >>"$OUT/on_card.log" 2>&1 || { echo "no NVIDIA GPU" >&2; exit 2; }
    # Compiling takes most of the tests' time: several processes where pytest-xdist is installed.
    PARALLEL=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n 6")
    # A kernel that is wrong is not worth timing: numerics, poison and odd lengths first, without reruns.
    tests smoke 150 -x -k "float32 and 4096 and Causal"
    # shellcheck disable=SC2086 # two words or none
    tests numerics 270 $PARALLEL -k "not reruns"
    peers
    tests reruns 80 -k reruns
    sparse
    step tiles 200 "$PYTHON" scripts/tune.py tiles --widths 128 64 --rounds 7 --compiled "$COMPILED" --json "$OUT/$CARD-tiles.json"
fi
[ "$RAN" -gt 0 ] || { echo "no such step:$STEPS" >&2; exit 2; }
echo "$FAILED of $RAN steps failed"
exit "$FAILED"
