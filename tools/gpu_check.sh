#!/usr/bin/env bash
# What a GPU has to show, in one go: its tests, then a run's throughput. The last lines are a table.
# Usage: tools/gpu_check.sh [FOLDER_FOR_RESULTS]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu_check}
mkdir -p "$out"
export PYTHONPATH=. PYTHONUNBUFFERED=1
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

"$python" -m pytest tests/gpu -p no:cacheprovider 2>&1 | tee "$out/tests.txt"
tests=$?

throughput="skipped: no DALI or no GPU"
if "$python" -c 'import nvidia.dali, sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  "$python" tools/faces.py --identities 500 --images 20 --output "$out/faces" &&
    "$python" -m torch.distributed.run --standalone --nproc_per_node=gpu train.py configs/ms1mv3_r50.toml \
      data.path="$out/faces" evaluation.pairs='[]' run.folder="$out/run" training.global_batch=256 \
      training.epochs=5.0 backbone.compile=true export.enabled=false &&
    throughput=$(tail -n 1 "$out/run/metrics.jsonl")
fi

benchmark() {
  "$python" tools/benchmark_head.py --device cuda "$@" --json 2>&1 | tee -a "$out/head.txt" | tail -n 1
}
head_1m=$(benchmark --classes 1000000 --batch 1024 --steps 10 --reference)
head_10m=$(benchmark --classes 10000000 --batch 1024 --steps 5)

echo "---"
"$python" -c 'import torch; print("device  ", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"); print("torch   ", torch.__version__)'
echo "tests    $([ "$tests" = 0 ] && echo passed || echo "failed ($tests)"): $(tail -n 1 "$out/tests.txt")"
echo "head, 1 M classes, batch 1024: $head_1m"
echo "head, 10 M classes, batch 1024: $head_10m"
echo "IResNet-50, bf16, compiled, last record: $throughput"
exit "$tests"
