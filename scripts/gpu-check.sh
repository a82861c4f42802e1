#!/usr/bin/env bash
# Compares every operation of the CUDA engine with plain CPU computations, on this machine's GPU.
#
#   scripts/gpu-check.sh [BINARY] [SECTION...] [--json]     default BINARY: target/release/serenity-gpu-check
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
if [ ! -x "$binary" ]; then
  echo "error: there is no $binary" >&2
  echo "  to do: cargo build --release -p serenity-cuda" >&2
  exit 69
fi

folders=()
for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda /usr/local/cuda-13* /usr/local/cuda-12* target/cuda-toolkit/nvidia/cu13; do
  [ -n "$home" ] && folders+=("$home/lib64" "$home/lib" "$home/targets/x86_64-linux/lib")
done
folders+=(/usr/lib/x86_64-linux-gnu /usr/local/nvidia/lib64)
if command -v python3 >/dev/null; then
  while read -r site; do
    folders+=("$site"/nvidia/cu13/lib "$site"/nvidia/cublas/lib "$site"/nvidia/cudnn/lib "$site"/nvidia/cuda_nvrtc/lib)
  done < <(python3 -c 'import site, sys, sysconfig
paths = [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], site.getusersitepackages(), *getattr(site, "getsitepackages", list)()]
paths += [p for p in sys.path if p.endswith("-packages")]
print("\n".join(dict.fromkeys(paths)))' 2>/dev/null || true)
fi

path=${LD_LIBRARY_PATH:-}
for library in libcuda.so libnvrtc.so libcublasLt.so libcudnn.so; do
  found=
  for folder in "${folders[@]}"; do
    if compgen -G "$folder/$library*" >/dev/null; then
      found=$folder
      break
    fi
  done
  if [ -n "$found" ]; then
    echo "$library: $found"
    # The linker's own folders come in by themselves, and must not hide a wheel's newer libraries.
    case ":$path:" in
      *":$found:"*) ;;
      *) [ "$found" = /usr/lib/x86_64-linux-gnu ] || path=${path:+$path:}$found ;;
    esac
  else
    echo "$library: not in the usual places; left to the linker"
  fi
done
exec env LD_LIBRARY_PATH="$path" "$binary" "$@"
