#!/usr/bin/env bash
# Times training steps on this machine's GPU with the real ring and loader: a row of docs/performance.md for each configuration in bench/.
#
#   scripts/gpu-bench.sh [--bin DIR] [--data DIR] [--steps N] [--set KEY=VALUE]... [ROW...]      a row is the name of a file in bench/, without .json
#
# DIR of --data holds (or gets: `serenity-slab synth`, 34 GB) the full-size random slab dev.safetensors; a folder in /dev/shm stands in
# for a fast disk. Each row: JSON on standard output, the table of the trainer on standard error.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=target/release data=output/bench steps=10 rows=() sets=()
while [ $# -gt 0 ]; do
  case $1 in
    --bin) bin=$2; shift 2 ;;
    --data) data=$2; shift 2 ;;
    --steps) steps=$2; shift 2 ;;
    --set) sets+=(--set "$2"); shift 2 ;;
    -*) echo "error: unknown option $1" >&2; exit 64 ;;
    *) rows+=("$1"); shift ;;
  esac
done
[ ${#rows[@]} -gt 0 ] || rows=(512-6g 512-11g 512-24g 1024-14g 512-resident 512-6g-accumulation-8 512-24g-dequant-cpu)
mkdir -p "$data" output/bench
. scripts/gpu-libraries.sh

slab=$data/dev.safetensors
if [ ! -f "$slab" ] || [ ! -f "$data/dev.manifest.json" ]; then
  "$bin/serenity-slab" synth --preset flux_2_dev --slab-only --output "$data/dev" >&2
fi
loader=
trap '[ -z "$loader" ] || kill "$loader" 2>/dev/null || true' EXIT
failed=0
for row in "${rows[@]}"; do
  config=bench/$row.json
  [ -f "$config" ] || { echo "error: there is no $config" >&2; exit 64; }
  where=(--set "memory.stagehand.squareq_slab_path=$slab" --set "memory.stagehand.squareq_manifest_path=$data/dev.manifest.json" "${sets[@]}")
  "$bin/serenity-loader" --config "$config" "${where[@]}" 2> "output/bench/$row.loader.log" &
  loader=$!
  if result=$("$bin/serenity-trainer" bench --config "$config" "${where[@]}" --synthetic-samples --steps "$steps" --json 2> "output/bench/$row.trainer.log"); then
    echo "{\"row\":\"$row\",\"result\":$result}"
  else
    echo "{\"row\":\"$row\",\"failed\":$?}"
    tail -n 5 "output/bench/$row.trainer.log" "output/bench/$row.loader.log" >&2
    failed=1
  fi
  kill "$loader" 2>/dev/null || true
  wait "$loader" 2>/dev/null || true
  loader=
done
exit $failed
