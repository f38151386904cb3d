#!/usr/bin/env bash
# The CUDA side as far as a machine without a GPU can check it (`make cuda-check`):
#   the mathematics shared with the CPU, compiled for the host and tested;
#   every kernel's own source on the host (csrc/tests/emulation), behind the operators, in the tests of the kernels;
#   every kernel compiled for sm_80, sm_90 and PTX, with its registers and spills (bounds below);
#   the CUDA-enabled library linked, loaded on the installed torch, and one operator run on CPU tensors.
# No kernel runs on a GPU here. Everything is written to build/, so a second run compiles little.
set -euo pipefail
cd "$(dirname "$0")/../.."
MAX_SPILL_BYTES=0
MAX_REGISTERS=240  # a block of 256 threads still fits a multiprocessor's 65,536

mkdir -p build
for test in test_shared_math test_jet_math test_attention; do
  if [ ! -x "build/$test" ] || [ -n "$(find csrc/common "csrc/tests/$test.cpp" csrc/tests/check.h -newer "build/$test")" ]; then
    "${CXX:-g++}" -std=c++17 -O2 -Wall -Wextra -Wno-psabi -Icsrc "csrc/tests/$test.cpp" -o "build/$test"
  fi
  "build/$test"
done

echo "cuda-check: the CUDA kernels on the host, in the tests of the kernels"
FLATKERN_CUDA=emulated FLATKERN_BUILD=required python setup.py -q build_ext --build-lib build/cuda-emulated
on_host() { FLATKERN_LIBRARY="$PWD/build/cuda-emulated/flatkern/_C.so" "$@"; }
FLATKERN_EMULATION_ORDER=warp-by-warp-backward on_host \
  python -m pytest tests/kernels -n "${WORKERS:-2}" --dist loadfile -m "not slow and not cpu_kernels"
# what the sanitizers of gpu_check.sh run is there
python -m pytest tests/kernels/test_cuda.py tests/kernels/test_jets_cuda.py --collect-only -k "dtype0" >/dev/null
on_host python -m benchmarks.bench_gpu --device cpu --quick --output build/gpu-quick >/dev/null  # does it run

if ! command -v nvcc >/dev/null && [ ! -x "${CUDA_HOME:-/nonexistent}/bin/nvcc" ]; then
  echo "cuda-check: nvcc was not found, so the CUDA kernels were NOT compiled for a GPU (on the host: passed)"
  exit 0
fi

export FLATKERN_CUDA=1 FLATKERN_BUILD=required TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX"
python setup.py -q build_ext --build-lib build/cuda-check

MAX_SPILL_BYTES=$MAX_SPILL_BYTES MAX_REGISTERS=$MAX_REGISTERS python - <<'PYTHON'
import glob
import os
import re
import subprocess
import sys

limit, worst, rows = int(os.environ["MAX_SPILL_BYTES"]), 0, []
for log in sorted(glob.glob("build/*-cuda-80-90-90+PTX/*.log")):
    name = arch = ""
    spill = 0
    for line in open(log):
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            name, arch = found.groups()
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spill = sum(map(int, found.groups()))
        elif found := re.search(r"Used (\d+) registers", line):
            rows.append((name, arch, int(found[1]), spill))
            worst = max(worst, spill)
names = "\n".join(r[0] for r in rows)
plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True).stdout.splitlines()
if not rows:
    sys.exit("cuda-check: ptxas reported no kernel at all")
print(f"{'kernel':58} {'arch':6} {'registers':>9} {'spilled bytes':>13}")
for (_, arch, registers, spill), name in zip(rows, plain):
    short = re.sub(r"^void |flatkern::cuda::|\(anonymous namespace\)::|\(.*$", "", name.split(">(")[0] + ">")
    print(f"{short:58} {arch:6} {registers:9d} {spill:13d}")
most = max(r[2] for r in rows)
if most > int(os.environ["MAX_REGISTERS"]):
    sys.exit(f"cuda-check: a kernel takes {most} registers, more than the {os.environ['MAX_REGISTERS']} allowed")
if worst > limit:
    sys.exit(f"cuda-check: a kernel spills {worst} bytes, more than the {limit} allowed")
PYTHON

python - <<'PYTHON'
import pathlib

import torch

library = pathlib.Path("build/cuda-check/flatkern/_C.so").resolve()
torch.ops.load_library(library)
x = torch.randn(20, 10, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
logdet = torch.ops.flatkern.gram_stats(x)[0]
torch.testing.assert_close(logdet, torch.linalg.slogdet(x @ x.mT).logabsdet)
torch.testing.assert_close(torch.ops.flatkern.activation_derivatives(x, 4, 1.0, 0.0)[0], x.tanh())
where = "" if torch.cuda.is_available() else "; there is no GPU here, so no CUDA kernel was run"
print(f"cuda-check: {library.name} with CUDA kernels built, linked and loaded on torch {torch.__version__}{where}")
PYTHON
