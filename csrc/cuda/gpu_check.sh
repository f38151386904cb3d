#!/usr/bin/env bash
# The CUDA kernels on a GPU (`make gpu-check`): built in place for it, tested, timed, run under compute-sanitizer. PYTHON
# names the interpreter of an environment with torch for CUDA, nvcc, ninja, setuptools, and for the tests pytest,
# pytest-benchmark, hypothesis, mpmath and scipy; OUT a folder for the results (build/gpu); STEPS some of the steps, as
# "build tests bench". What one run showed belongs in docs/gpu-results.md. Steps go on after a failure, and none takes
# longer than its limit, so that a short lease shows all there is; the last line says which failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
STEPS=${STEPS:-build info tests bench memcheck racecheck}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
failed=""
step() {  # name, seconds it may take, command
  local name=$1 most=$2 begun=$SECONDS
  shift 2
  case " $STEPS " in *" $name "*) ;; *) return ;; esac
  echo "== $name"
  timeout -s INT -k 20 "$most" "$@" >"$OUT/$name.log" 2>&1 || failed="$failed $name"
  tail -n 25 "$OUT/$name.log"
  echo "== $name: $((SECONDS - begun)) s"
}

TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')} \
  FLATKERN_CUDA=1 FLATKERN_BUILD=required step build 200 "$PYTHON" setup.py -q build_ext --inplace
step info 60 "$PYTHON" -m flatkern.cli info
step tests 150 "$PYTHON" -m pytest tests/kernels -m "cuda and not slow" -q --maxfail 40
step bench 120 "$PYTHON" -m benchmarks.bench_gpu --output "$OUT"
if command -v compute-sanitizer >/dev/null; then
  few=(-m pytest tests/kernels/test_cuda.py tests/kernels/test_jets_cuda.py -q -k "dtype0 and not 1000 and not 128 and not 129")
  check=(compute-sanitizer --error-exitcode 9)
  # without torch's cache every tensor is an allocation of its own, beyond which a kernel must not reach
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step memcheck 120 "${check[@]}" --tool memcheck "$PYTHON" "${few[@]}"
  # of our kernels alone: torch's would take most of the time
  step racecheck 120 "${check[@]}" --tool racecheck --kernel-name kernel_substring=flatkern "$PYTHON" "${few[@]}"
fi
[ -z "$failed" ] && echo "gpu-check: passed" || { echo "gpu-check: FAILED:$failed"; exit 1; }
