#!/usr/bin/env bash
# Both encoders on this machine's GPU: against the reference's files, against the processor, one layer of real geometry against transformers, and how
# long a full-size pass takes.
#
#   scripts/gpu-check-encoder.sh [--bin DIR] [--scratch DIR] [check|layer|bench]...     default: all; binaries in target/release, weights in /dev/shm
#
# Exit 0: all agree (or there is no GPU: then it says SKIPPED). Other codes: something differs, or could not run. `bench` needs 36 GB in the scratch
# folder and prints the report; its verdict is the reader's.
set -uo pipefail
cd "$(dirname "$0")/.."

bin=target/release scratch=/dev/shm sections=()
while [ $# -gt 0 ]; do
  case $1 in
    --bin) bin=$2; shift 2 ;;
    --scratch) scratch=$2; shift 2 ;;
    *) sections+=("$1"); shift ;;
  esac
done
[ ${#sections[@]} -gt 0 ] || sections=(check layer bench)

if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU ' && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
  echo "SKIPPED: no GPU. Nothing of the encoders on CUDA was checked."
  exit 0
fi
encoder=$bin/serenity-encoder
if [ ! -x "$encoder" ]; then
  echo "error: there is no $encoder" >&2
  exit 69
fi
. scripts/gpu-libraries.sh

status=0
for section in "${sections[@]}"; do
  case $section in
    check)
      small=$(mktemp -d) || exit 69
      if "$bin/serenity-slab" build --model tests/fixtures/goldens/model --component text_encoder --output "$small/text" > /dev/null; then
        "$encoder" gpu-check --slab "$small/text.safetensors" || status=1
      else
        status=1
      fi
      rm -rf "$small"
      ;;
    layer)
      if python3 -c 'import torch, transformers, safetensors' 2> /dev/null; then
        python3 scripts/check_text_layer.py --encoder "$encoder" --device cuda || status=1
      else
        echo "SKIPPED: no PyTorch with transformers here. A layer of the text encoder was not compared with it."
      fi
      ;;
    bench)
      model=$(mktemp -d "$scratch/serenity-encoder-bench.XXXXXX") || exit 69
      trap 'rm -rf "$model"' EXIT
      time "$encoder" synth --output "$model" || status=1
      "$encoder" bench --text-encoder "$model/text_encoder" --device cuda --json || status=1
      for readers in 12 14 16; do
        "$encoder" bench --text-encoder "$model/text_encoder" --device cuda --readers "$readers" || status=1
      done
      "$encoder" bench --vae "$model/vae" --device cuda || status=1
      ;;
    *) echo "error: there is no section $section (check, layer, bench)" >&2; exit 64 ;;
  esac
done
exit $status
