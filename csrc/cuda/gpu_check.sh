#!/usr/bin/env bash
# The CUDA kernels on a GPU (`make gpu-check`), in an environment that has torch with CUDA, nvcc, ninja and pytest:
# built in place for this GPU, tested, run under compute-sanitizer, timed. PYTHON names the interpreter, OUT a folder for
# the results (build/gpu). What one run of it showed belongs in docs/gpu-results.md. Steps go on after a failure, so that
# a short lease shows all there is; the last line says which failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
failed=""
step() {  # name, seconds it may take, command
  local name=$1 most=$2 begun=$SECONDS
  shift 2
  echo "== $name"
  timeout "$most" "$@" >"$OUT/$name.log" 2>&1 || failed="$failed $name"
  tail -n 25 "$OUT/$name.log"
  echo "== $name: $((SECONDS - begun)) s"
}

TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')} \
  FLATKERN_CUDA=1 FLATKERN_BUILD=required step build 300 "$PYTHON" setup.py -q build_ext --inplace
step info 60 "$PYTHON" -m flatkern.cli info
step tests 240 "$PYTHON" -m pytest tests/kernels -m "cuda and not slow" -q --maxfail 40
step bench 150 "$PYTHON" -m benchmarks.bench_gpu --output "$OUT"
if command -v compute-sanitizer >/dev/null; then
  few=(-m pytest tests/kernels/test_cuda.py tests/kernels/test_jets_cuda.py -q -k "float32 and not 1000 and not 128")
  step memcheck 120 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" "${few[@]}"
  step racecheck 120 compute-sanitizer --tool racecheck --error-exitcode 9 "$PYTHON" "${few[@]}"
fi
[ -z "$failed" ] && echo "gpu-check: passed" || { echo "gpu-check: FAILED:$failed"; exit 1; }
