#!/usr/bin/env bash
# Compares every operation of the CUDA engine with plain CPU computations, on this machine's GPU.
#
#   scripts/gpu-check.sh [BINARY] [SECTION...] [--json]     default BINARY: target/release/serenity-gpu-check
#   scripts/gpu-check.sh processes [--bin DIR] [...]        whole runs through all processes instead: see scripts/gpu_processes.py
#   scripts/gpu-check.sh sanitizer [DIR]                    training steps of the reference's tiny model under compute-sanitizer, memcheck and racecheck
#   scripts/gpu-check.sh step [DIR]                         the training step: goldens, the CPU path, streamed = resident, full-size blocks against PyTorch
#   scripts/gpu-check.sh all [DIR]                          all of them, with the programs in DIR (default target/release)
#
# Exit 0: all agree (or there is no GPU: then it says SKIPPED). 1: something differs. Other codes: it could not run.
# Libraries (driver, nvrtc, cublasLt, cudnn) are looked for in the usual places and in the wheels of python3's site-packages.
set -euo pipefail
cd "$(dirname "$0")/.."

binary=target/release/serenity-gpu-check
if [ $# -gt 0 ] && [ -x "$1" ] && [ ! -d "$1" ]; then
  binary=$1
  shift
fi

if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU ' && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
  echo "=================================================================="
  echo "SKIPPED: no GPU. Nothing of the CUDA engine was checked."
  echo "=================================================================="
  exit 0
fi
if [ "${1:-}" = processes ]; then
  shift
  . scripts/gpu-libraries.sh
  exec python3 scripts/gpu_processes.py "$@"
fi
if [ "${1:-}" = sanitizer ]; then
  . scripts/gpu-libraries.sh
  PATH=$PATH:/usr/local/cuda/bin
  command -v compute-sanitizer > /dev/null || { echo "error: there is no compute-sanitizer (it comes with the CUDA toolkit)" >&2; exit 69; }
  compute-sanitizer --tool memcheck --error-exitcode 1 "${2:-target/release}/serenity-trainer" gpu-check golden
  # racecheck does not know the barriers of cuDNN's kernels and reports hazards inside them: here attention is our own.
  SERENITY_ATTENTION=own compute-sanitizer --tool racecheck --error-exitcode 1 "${2:-target/release}/serenity-trainer" gpu-check golden
  exit 0
fi
if [ "${1:-}" = step ]; then
  . scripts/gpu-libraries.sh
  blocks=$(mktemp -d)
  trap 'rm -rf "$blocks"' EXIT
  "${2:-target/release}/serenity-trainer" gpu-check golden processor streamed block --dump "$blocks"
  if python3 -c 'import torch, numpy' 2> /dev/null; then
    python3 scripts/check_block_torch.py "$blocks"
  else
    echo "SKIPPED: no PyTorch here. Gradients of full-size blocks were not compared with it."
  fi
  exit 0
fi
if [ "${1:-}" = all ]; then
  dir=${2:-target/release}
  "$0" "$dir/serenity-gpu-check"
  "$0" sanitizer "$dir"
  "$0" step "$dir"
  scripts/gpu-check-encoder.sh --bin "$dir" check layer
  exec "$0" processes --bin "$dir"
fi
if [ ! -x "$binary" ]; then
  echo "error: there is no $binary" >&2
  echo "  to do: cargo build --release -p serenity-cuda" >&2
  exit 69
fi

. scripts/gpu-libraries.sh
exec "$binary" "$@"
