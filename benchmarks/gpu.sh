#!/usr/bin/env bash
# What there is to measure on a lent GPU, in one go, within 9 minutes. Two halves, since the GPU machine has no network:
#   bash benchmarks/gpu.sh prepare      here: wheels that its image lacks, for Python 3.12, into .wheels/ (carry this folder)
#   bash benchmarks/gpu.sh run "$OUT"   there: kernels compiled, checked, sanitized, timed; the tests; the demo run
#   bash benchmarks/gpu.sh rehearse     here: the same list on the CPU, definitions in place of kernels
# Every part has a time limit and none stops the others; what failed is in summary.txt, the exit code counts it.
set -euo pipefail
cd "$(dirname "$0")/.."

prepare() {
  rm -rf .wheels && mkdir .wheels
  python3 -m pip download --quiet --no-deps --dest .wheels --python-version 3.12 --only-binary=:all: \
    compressed-tensors==0.20.0 loguru typer rich ruamel.yaml pydantic pydantic_core annotated-types annotated-doc \
    typing-inspection typing_extensions shellingham markdown-it-py mdurl pygments click accelerate psutil \
    safetensors pytest pytest-timeout pluggy iniconfig
  du -sh .wheels
}

SECONDS_IN_ALL=530
TOPICS="linear gemm w8a8 experts attention decode"

# part NAME SECONDS LOG COMMAND...: run with a limit, keep the log's end in LOG, write down how it ended
part() {
  local name=$1 limit=$2 log=$3 left=$((SECONDS_IN_ALL - SECONDS)) begin=$SECONDS code=0
  shift 3
  if [ "$left" -lt 5 ]; then
    echo "$name: left out, no time" | tee -a "$out/summary.txt"
    return
  fi
  echo "== $name" >> "$log"
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" >> "$log" 2>&1 || code=$?
  echo "$name: exit $code, $((SECONDS - begin)) s: $(tail -n 1 "$log" | cut -c 1-150)" | tee -a "$out/summary.txt"
  [ "$code" -eq 0 ] || failures=$((failures + 1))
}

kernels() { # kernels PYTHON [--cpu]
  local python=$1 mode=${2:-} topic
  for topic in build small; do
    part "$topic" 90 "$out/kernels.txt" "$python" -m "benchmarks.gpu.$topic" --out "$rows/$topic.json" $mode
  done
  for topic in $TOPICS; do
    part "$topic, check" 60 "$out/kernels.txt" "$python" -m "benchmarks.gpu.$topic" --only check --out "$rows/$topic-check.json" $mode
  done
  for topic in $TOPICS; do
    part "$topic, time" 60 "$out/kernels.txt" "$python" -m "benchmarks.gpu.$topic" --only time --out "$rows/$topic.json" $mode
  done
}

sanitize() { # sanitize PYTHON: small shapes under compute-sanitizer, where the image has it
  local tool sanitizer
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null | head -n 1 || true)
  if [ -z "$sanitizer" ]; then
    echo "compute-sanitizer: not on this machine" | tee -a "$out/summary.txt"
    return
  fi
  for tool in memcheck racecheck; do
    # without torch's cache of memory each tensor is an allocation of its own, whose ends memcheck knows
    part "$tool" 100 "$out/sanitizer.txt" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 "$1" -m benchmarks.gpu.small
  done
}

# One file for all rows: at most 8 files come back
gather() {
  "$1" - "$rows" "$out/kernels.json" <<'PYTHON'
import json, pathlib, sys
rows = {path.stem: json.loads(path.read_text()) for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json"))}
pathlib.Path(sys.argv[2]).write_text(json.dumps(rows, indent=1) + "\n")
PYTHON
}

start() { # start OUT
  out=$1 rows=$(mktemp -d) failures=0
  mkdir -p "$out"
  : > "$out/summary.txt"
  export HF_HUB_OFFLINE=1 PYTHONPATH=$PWD
}

run() {
  start "${1:?usage: gpu.sh run OUT}"
  local python=/tmp/gpu-venv/bin/python
  nvidia-smi > "$out/summary.txt"
  python3 -m venv --system-site-packages /tmp/gpu-venv
  # only what the image lacks: torch and transformers stay the image's own
  for wheel in .wheels/*.whl; do
    $python -m pip install --quiet --no-index --no-deps "$wheel"
  done
  kernels "$python"
  sanitize "$python"
  part tests 240 "$out/tests.txt" "$python" -m pytest -q -m "not slow" tests/quant tests/algorithms tests/kernels tests/layers \
    tests/models tests/calibration tests/passes
  part demo 90 "$out/demo.md" "$python" -m compressor run recipes/int4_moe.yaml --out /tmp/gpu-demo
  cp /tmp/gpu-demo/report.json "$out/demo-report.json" || true
  part ceilings 60 "$out/kernels.txt" "$python" benchmarks/gpu_ceilings.py --out "$rows/ceilings.json"
  gather "$python"
  exit "$failures"
}

rehearse() {
  start "${1:-$(mktemp -d)}"
  kernels .venv/bin/python --cpu
  gather .venv/bin/python
  echo "results: $out"
  exit "$failures"
}

"${1:?usage: gpu.sh prepare | run OUT | rehearse [OUT]}" "${@:2}"
