#!/usr/bin/env bash
# A CUDA 13 build environment without root, GPU or installed toolkit, from NVIDIA's wheels on the Python package index.
#
#   scripts/cuda-toolkit.sh [FOLDER]        default FOLDER: target/cuda-toolkit
#   source FOLDER/env.sh                    CUDA_HOME, PATH, LIBRARY_PATH for cargo build --features cuda
#
# It holds what nvcc needs and the libraries to link against. libcuda.so is a stub made here from the names in cuda.h: it is for the
# linker alone; on the machine that runs the program the driver's own library is found. About 0.7 GB of downloads; nothing is written
# outside FOLDER. CUDA_COMPUTE_CAP (default 90: H100; 86: 3090, 89: 4090, 120: 5090) chooses the architecture of the kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-target/cuda-toolkit}")
home="$folder/nvidia/cu13"

packages=(
  nvidia-cuda-nvcc==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvrtc==13.0.88 nvidia-nvvm==13.0.88
  nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-curand==10.4.0.35 nvidia-cublas==13.1.0.3
)

if [ ! -e "$folder/complete" ]; then
  mkdir -p "$folder/wheels"
  python3 -m pip download --quiet --no-deps --only-binary=:all: -d "$folder/wheels" "${packages[@]}"
  for wheel in "$folder"/wheels/*.whl; do
    python3 -m zipfile -e "$wheel" "$folder"
  done
  rm -rf "$folder/wheels"
  chmod +x "$home"/bin/* 2>/dev/null || true
  find "$home" -path '*nvvm/bin/*' -exec chmod +x {} +

  # The linker looks for libX.so; the wheels ship libX.so.N.
  for library in "$home"/lib/lib*.so.*; do
    plain="${library%%.so.*}.so"
    [ -e "$plain" ] || ln -s "$(basename "$library")" "$plain"
  done
  ln -sfn lib "$home/lib64"

  # Every function that cuda.h declares, with the _v2 and later forms that its macros name.
  mkdir -p "$home/lib/stubs"
  python3 - "$home/include/cuda.h" > "$home/lib/stubs/cuda.c" <<'PY'
import re, sys
text = open(sys.argv[1]).read()
names = set(re.findall(r"\b(cu[A-Z]\w*)\s*\(", text)) | set(re.findall(r"\b(cu[A-Z]\w*_v\d)\b", text)) | set(re.findall(r"\b(cu[A-Z]\w*_(?:ptsz|ptds))\b", text))
names |= {n + "_v2" for n in names if not re.search(r"_v\d$|_ptsz$|_ptds$", n)}
print("\n".join(f"int {n}(void) {{ return 999; }}" for n in sorted(names)))
PY
  cc -shared -fPIC -w -fno-builtin -Wl,-soname,libcuda.so.1 -o "$home/lib/stubs/libcuda.so" "$home/lib/stubs/cuda.c"
  ln -sfn libcuda.so "$home/lib/stubs/libcuda.so.1"
  touch "$folder/complete"
fi

cat > "$folder/env.sh" <<ENV
export CUDA_HOME="$home" CUDA_PATH="$home" CUDA_ROOT="$home" CUDA_TOOLKIT_ROOT_DIR="$home"
export PATH="$home/bin:\$PATH"
export CUDA_COMPUTE_CAP="\${CUDA_COMPUTE_CAP:-90}"
export LIBRARY_PATH="$home/lib:$home/lib/stubs\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
export RUSTFLAGS="-L native=$home/lib -L native=$home/lib/stubs \${RUSTFLAGS:-}"
ENV
echo "source $folder/env.sh"
"$home/bin/nvcc" --version | tail -n 2
