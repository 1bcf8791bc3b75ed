#!/bin/sh
# All that a Hopper card is wanted for, in under 20 minutes of its time, the most telling first:
#   sh scripts/on_card.sh [FOLDER]              results as JSON and logs in FOLDER (default docs/results)
#   REHEARSE=1 sh scripts/on_card.sh [FOLDER]   on a CPU, before: collects the tests, compiles for an H100, and
#                                               writes the tile sizes that are worth timing
# Each step has its own limit, so that one that hangs costs no more than that; the exit status counts failures.
set -u
OUT=${1:-docs/results}
PYTHON=${PYTHON:-python3}
FAILED=0
mkdir -p "$OUT"
export PYTHONPATH=. PYTHONUNBUFFERED=1

step() { # name, seconds, command...
    name=$1 limit=$2
    shift 2
    echo "== $name"
    start=$(date +%s)
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    [ $status -eq 0 ] || FAILED=$((FAILED + 1))
    tail -n 3 "$OUT/$name.log"
    echo "== $name: status $status, $(($(date +%s) - start)) s"
}

if [ -n "${REHEARSE:-}" ]; then
    export JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1
    step collect 120 "$PYTHON" -m pytest tests/test_mosaic_gpu.py -m gpu --collect-only -q
    step compile 900 "$PYTHON" -m tests.aot_gpu "128 causal"
    step tiles 7200 "$PYTHON" scripts/tune.py tiles --rehearse --widths 128 64 --json "$OUT/h100-compiled.json"
else
    nvidia-smi >"$OUT/nvidia-smi.log" 2>&1 || { echo "no NVIDIA GPU" >&2; exit 2; }
    # A kernel that is wrong is not worth timing: numerics, poison and odd lengths first, without reruns.
    step smoke 120 "$PYTHON" -m pytest tests/test_mosaic_gpu.py -m gpu -x -q -p no:cacheprovider -k "float32 and 4096 and Causal"
    step numerics 300 "$PYTHON" -m pytest tests/test_mosaic_gpu.py -m gpu -q -p no:cacheprovider -k "not reruns"
    step peers 240 "$PYTHON" scripts/tune.py peers --widths 64 128 256 --lengths 4096 16384 --rounds 9 --json "$OUT/h100-attention.json"
    step reruns 90 "$PYTHON" -m pytest tests/test_mosaic_gpu.py -m gpu -q -p no:cacheprovider -k reruns
    step sparse 90 "$PYTHON" scripts/tune.py sparse --rounds 9 --json "$OUT/h100-sparse.json"
    step tiles 300 "$PYTHON" scripts/tune.py tiles --widths 128 64 --rounds 7 --compiled "$OUT/h100-compiled.json" --json "$OUT/h100-tiles.json"
fi
echo "$FAILED steps failed"
exit "$FAILED"
