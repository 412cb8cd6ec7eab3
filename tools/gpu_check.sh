#!/usr/bin/env bash
# What one GPU has to show, in one go: its tests, then the benchmarks of the head, the data pipeline and training.
# Usage: [PYTHON=python3] [GPU_CHECK_SECONDS=570] tools/gpu_check.sh [FOLDER_FOR_RESULTS]
#
# FOLDER/results.jsonl gets one JSON object a part, with the machine it was measured on; FOLDER/NAME.txt what the part
# printed. A part is skipped, with a reason, where the machine lacks something, and once the time is used up. The last
# lines are a table; the exit status is 1 where a part failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu_check}
deadline=${GPU_CHECK_SECONDS:-570}
least=15
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$out"
: >"$out/results.jsonl"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# Assignments for this shell; a package that is missing is the `lacking` of every part.
facts=$("$python" - facts <<'PY'
import importlib.util
import shlex
import sys

facts = {"device": "none", "gpus": 0, "memory_gb": 0, "torch": "none", "triton": "none", "cuda": "none", "lacking": ""}
facts |= {"dali": "", "pytest": "", "python_version": sys.version.split()[0]}
try:
    import torch

    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda or "none", "gpus": torch.cuda.device_count()}
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        facts |= {"device": torch.cuda.get_device_name(0), "memory_gb": int(memory / 1e9)}
        import recognition.benchmark
    else:
        facts["lacking"] = "there is no CUDA device"
except ImportError as error:
    facts["lacking"] = str(error)
if importlib.util.find_spec("triton"):
    import triton

    facts["triton"] = triton.__version__
try:
    facts["dali"] = "yes" if importlib.util.find_spec("nvidia.dali") else ""
except ModuleNotFoundError:
    pass
facts["pytest"] = "yes" if importlib.util.find_spec("pytest") else ""
for name, value in facts.items():
    print(f"export check_{name}={shlex.quote(str(value))}")
PY
) || facts="export check_gpus=0 check_memory_gb=0 check_lacking='$python does not run'"
eval "$facts"
check_commit=$(git describe --always --dirty 2>/dev/null || echo unknown)
export check_commit

# record NAME STATUS REASON SECONDS LOG COMMAND...: the object, whose result is the last line of the log if that is JSON.
record() {
  "$python" - record "$@" >>"$out/results.jsonl" <<'PY'
import json
import os
import sys

name, status, reason, seconds, log, *command = sys.argv[2:]
lines = open(log, encoding="utf-8", errors="replace").read().split("\n") if os.path.exists(log) else []
lines = [line for line in lines if line.strip()]
try:
    result = json.loads(lines[-1])
except (IndexError, json.JSONDecodeError):
    result = lines[-1].strip("= ") if lines else None
facts = ("device", "gpus", "memory_gb", "torch", "triton", "cuda", "python_version", "commit")
machine = {fact: os.environ.get(f"check_{fact}", "unknown") for fact in facts}
part = {"part": name, "status": status, "reason": reason, "seconds": int(seconds), "command": " ".join(command)}
print(json.dumps(part | {"result": result if status != "skipped" else None} | machine))
PY
}

# part NAME SECONDS REASON COMMAND...: run it for so long at most, or skip it, if there is a reason to.
part() {
  local name=$1 seconds=$2 reason=${check_lacking:-$3} left=$((deadline - SECONDS)) start=$SECONDS status
  local log="$out/${name//[^A-Za-z0-9]/_}.txt"
  shift 3
  rm -f "$log"
  echo "=== $name"
  [ -z "$reason" ] && [ "$left" -lt "$least" ] && reason="the time is used up"
  if [ -n "$reason" ]; then
    echo "skipped: $reason"
    record "$name" skipped "$reason" 0 "$log" "$@"
    return
  fi
  timeout --kill-after=5 $((left < seconds ? left : seconds)) "$@" >"$log" 2>&1
  status=$?
  tail -n 25 "$log"
  if [ "$status" = 0 ]; then
    record "$name" passed "" $((SECONDS - start)) "$log" "$@"
  elif [ "$status" = 124 ] || [ "$status" = 137 ]; then
    if [ "$left" -lt "$seconds" ]; then
      record "$name" skipped "the time was used up while it ran" $((SECONDS - start)) "$log" "$@"
    else
      record "$name" failed "it took longer than $seconds s" $((SECONDS - start)) "$log" "$@"
    fi
  elif grep -q "the GPU's memory has run out" "$log"; then
    record "$name" skipped "the GPU's memory ran out" $((SECONDS - start)) "$log" "$@"
  else
    record "$name" failed "status $status" $((SECONDS - start)) "$log" "$@"
  fi
}

# The reasons for which a part is skipped; nothing where there is none.
memory() { [ "$check_memory_gb" -ge "$1" ] || echo "needs $1 GB of memory, the GPU has $check_memory_gb"; }
gpus() { [ "$check_gpus" -ge "$1" ] || echo "needs $1 GPUs, there is $check_gpus"; }
dali() { [ -n "${check_dali:-}" ] || echo "DALI is not installed"; }
pytest() { [ -n "${check_pytest:-}" ] || echo "pytest is not installed"; }

head=("$python" tools/benchmark_head.py --device cuda --json)
training=("$python" tools/benchmark_training.py --device cuda --json)

# Foreign packages' warnings depend on their versions, which are this machine's.
part "tests" 200 "$(pytest)" "$python" -m pytest tests/gpu -q -p no:cacheprovider -W default
part "head 1M B1024" 60 "$(memory 36)" "${head[@]}" --classes 1000000 --batch 1024 --steps 20 --reference
part "head 1M B1024 without Triton" 40 "$(memory 8)" \
  "${head[@]}" --classes 1000000 --batch 1024 --steps 10 --kernels torch
part "head 1M B8192" 60 "$(memory 8)" "${head[@]}" --classes 1000000 --batch 8192 --steps 10 --reference
part "head 10M B1024" 60 "$(memory 46)" "${head[@]}" --classes 10000000 --batch 1024 --steps 10 --reference
part "head 10M B8192" 75 "$(memory 46)" "${head[@]}" --classes 10000000 --batch 8192 --steps 5
part "head 10M sampled 0.1 B1024" 60 "$(memory 46)" \
  "${head[@]}" --classes 10000000 --batch 1024 --steps 10 --sample-rate 0.1
part "head 30M bfloat16 B1024" 75 "$(memory 68)" \
  "${head[@]}" --classes 30000000 --batch 1024 --steps 5 --state bfloat16
part "head 10M B1024 on all GPUs" 75 "$(gpus 2)" \
  "${head[@]}" --classes 10000000 --batch 1024 --steps 5 --ranks "${check_gpus:-0}"
part "training IResNet-50" 150 "$(memory 20)" "${training[@]}" --backbone iresnet50 --batch 256
part "data faces" 60 "$(dali)" \
  "$python" tools/faces.py --identities 100 --images 20 --pairs 20 --output "$out/faces"
part "data pipeline" 60 "$(dali)" \
  "$python" tools/benchmark_data.py --data "$out/faces" --device cuda --batch 256 --threads 4 --json
part "training IResNet-100" 200 "$(memory 30)" "${training[@]}" --backbone iresnet100 --batch 256 --steps 24

"$python" - table "$out/results.jsonl" <<'PY'
import json
import sys

parts = [json.loads(line) for line in open(sys.argv[2], encoding="utf-8")]


def number(value, form):
    return "?" if value is None else format(value, form)


def shown(part):
    found = part["result"]
    if part["status"] != "passed":
        return f"{part['status']}: {part['reason']}"
    if not isinstance(found, dict):
        return found or "passed"
    if "floor_ratio" in found:
        line = f"{1000 * found['step_seconds']:.2f} ms, {found['floor_ratio']:.2f} x floor, "
        line += f"{found['flops_per_second'] / 1e12:.0f} TFLOP/s, peak {found['peak_bytes'] / 1e9:.1f} GB"
        if found["baseline_ratio"] is not None:
            line += f", plain head {found['baseline_ratio']:.1f} x slower"
        elif "--reference" in part["command"]:
            line += ", plain head: out of memory"
        return line
    if "mfu" in found:
        return (
            f"{found['images_per_second']:,.0f} img/s, MFU {number(found['mfu'], '.1%')}, "
            f"{found['baseline_ratio']:.2f} x eager fp16 NCHW, {found['eager_ratio']:.2f} x eager bf16"
        )
    return ", ".join(f"{name}: {value:,.0f}" for name, value in found.items())


machine = parts[0]
print("---")
print(f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit']}")
width = max(len(part["part"]) for part in parts)
for part in parts:
    print(f"{part['part']:<{width}}  {part['seconds']:>4} s  {shown(part)}")
sys.exit(any(part["status"] == "failed" for part in parts))
PY
