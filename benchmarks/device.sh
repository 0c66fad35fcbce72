#!/usr/bin/env bash
# All that needs a GPU, in one call of less than ten minutes, what matters most first: install, `pytest -m gpu`, ceilings,
# the gpu-* benchmarks, agreement of eager, interpreted and compiled results, compute-sanitizer where there is one. No
# network is used.
#
#   [OUT=folder] [PYTHON=python3] [SECONDS_IN_ALL=570] benchmarks/device.sh
#
# Logs, JSONL and plots come under OUT (default benchmarks/out), and summary.txt with a line for every step. A step that
# fails or runs past its limit is recorded and the next one runs; what it had found by then stays under OUT. The limits
# of all steps together are less than SECONDS_IN_ALL. The exit status is 0 if every step passed and 1 otherwise.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=$(realpath -m "${OUT:-benchmarks/out}")
PYTHON=${PYTHON:-python3}
DEADLINE=${SECONDS_IN_ALL:-570}
mkdir -p "$OUT/logs"
SUMMARY=$OUT/summary.txt
: >"$SUMMARY"
rm -f "$OUT"/gpu-*.jsonl "$OUT"/gpu-*.png
failed=0

note() { printf '%s\n' "$*" | tee -a "$SUMMARY"; }

# step NAME SECONDS COMMAND...: run within its limit and what is left of all, log, record.
step() {
    local name=$1 limit=$2 start=$SECONDS left=$((DEADLINE - SECONDS)) status
    shift 2
    if ((left < 5)); then
        note "LEFT OUT  $name: the time is up"
        failed=1
        return 1
    fi
    ((limit > left)) && limit=$left
    timeout --kill-after=5 "$limit" "$@" >"$OUT/logs/$name.log" 2>&1
    status=$?
    if ((status == 0)); then
        note "passed    $name ($((SECONDS - start)) s)"
        return 0
    fi
    failed=1
    ((status == 124 || status == 137)) && status="timed out after $limit s" || status="status $status"
    note "FAILED    $name ($status, $((SECONDS - start)) s): $(tail -n 1 "$OUT/logs/$name.log" | cut -c1-200)"
    return 1
}

machine() {
    nvidia-smi || true
    "$PYTHON" - <<'PY'
import importlib.metadata as m, platform, sys, torch
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
for name in ("triton", "transformers", "numpy", "pytest", "setuptools", "matplotlib"):
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        print(name, "is not installed")
sys.exit(0 if torch.cuda.is_available() else "no CUDA device: what needs one is skipped or fails below")
PY
}

# pip without a network; else a tree of links that looks like the installed package, its entry point included.
install() {
    local places="import bitdelta_compile.lowering, bitdelta_compile.kernels as k; print(k.__file__)"
    if "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --no-index -e . && "$PYTHON" -c "$places"; then
        return 0
    fi
    echo "the environment cannot be written to, or its setuptools is too old: trying an environment of its own"
    if "$PYTHON" -m venv --system-site-packages "$WORK/venv" &&
        "$WORK/venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --no-index -e . &&
        "$WORK/venv/bin/python" -c "$places"; then
        echo "$WORK/venv/bin/python" >"$WORK/python"
        return 0
    fi
    echo "pip cannot install here: a tree of links"
    local tree=$WORK/tree
    mkdir -p "$tree/bitdelta_compile" "$tree/bitdelta_compile-0.1.0.dist-info"
    ln -sfn "$PWD"/bitdelta_compile/* "$PWD/kernels" "$PWD/lowering" "$tree/bitdelta_compile/"
    printf 'Metadata-Version: 2.1\nName: bitdelta_compile\nVersion: 0.1.0\n' >"$tree/bitdelta_compile-0.1.0.dist-info/METADATA"
    printf '[torch_dynamo_backends]\nbitdelta = bitdelta_compile.backend:bitdelta\n' >"$tree/bitdelta_compile-0.1.0.dist-info/entry_points.txt"
    echo "$tree" >"$WORK/pythonpath"
    PYTHONPATH=$tree "$PYTHON" -c "$places"
}

# gpu_tests FILE...: each with a log of its own, side by side: most of their time goes into compiling, and nothing is
# timed. The suite's own settings name a plugin; without the plugin they would be an error.
gpu_tests() {
    local settings=() pids=() failed=0 file pid
    "$PYTHON" -c "import pytest_timeout" 2>/dev/null || settings=(-c "$WORK/pytest.ini" --rootdir .)
    for file; do
        "$PYTHON" -m pytest "${settings[@]}" -p no:cacheprovider -m gpu -vv -rA --durations=15 "tests/gpu/test_$file.py" \
            >"$OUT/logs/tests-$file.log" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || failed=1
    done
    for file; do
        tail -n 1 "$OUT/logs/tests-$file.log"
    done
    return $failed
}

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
printf '[pytest]\naddopts = --import-mode=importlib --strict-markers\nmarkers =\n    gpu: needs a CUDA device\n' >"$WORK/pytest.ini"
export PYTHON OUT WORK PYTHONUNBUFFERED=1
export -f machine install gpu_tests

step machine 20 bash -c machine
step install 46 bash -c install
[[ -s $WORK/python ]] && PYTHON=$(<"$WORK/python")
[[ -s $WORK/pythonpath ]] && PYTHONPATH=$(<"$WORK/pythonpath") && export PYTHONPATH
export PYTHON
step tests 135 bash -c "gpu_tests eager compiled attached compress"
step ceilings 35 "$PYTHON" -m benchmarks gpu-ceilings --out "$OUT"
step decode 92 "$PYTHON" -m benchmarks gpu-decode --out "$OUT"
step generate 80 "$PYTHON" -m benchmarks gpu-generate --out "$OUT"
step fit 32 "$PYTHON" -m benchmarks gpu-fit --out "$OUT"
step prefill 62 "$PYTHON" -m benchmarks gpu-prefill --out "$OUT"
step agree 36 "$PYTHON" -m benchmarks gpu-agree --out "$OUT"
step sanitizer 28 bash -c "gpu_tests sanitizer"

for name in ceilings decode generate fit prefill agree; do
    [[ -s $OUT/gpu-$name.jsonl ]] && note "found     $(wc -l <"$OUT/gpu-$name.jsonl") records in gpu-$name.jsonl"
    if grep -q '^skipped:' "$OUT/logs/$name.log" 2>/dev/null; then
        note "SKIPPED   $name: $(grep -m 1 '^skipped:' "$OUT/logs/$name.log")"
        failed=1
    fi
done
{
    echo
    grep -h -A 60 '^gpu-' "$OUT"/logs/{ceilings,decode,generate,fit,prefill,agree}.log 2>/dev/null
    grep -h -E '^(FAILED|ERROR|=+ .*(passed|failed|error|skipped).*=+$)|^[0-9]+ (passed|failed|skipped)' "$OUT"/logs/tests-*.log 2>/dev/null
} >>"$SUMMARY"
note "$( ((failed)) && echo 'not all passed' || echo 'all passed') in $SECONDS s; $SUMMARY"
exit $failed
