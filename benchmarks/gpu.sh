#!/usr/bin/env bash
# What there is to measure on a lent GPU, in one go, under 10 minutes. Two halves, since the GPU machine has no network:
#   bash benchmarks/gpu.sh prepare     here: wheels that its image lacks, for Python 3.12, into .wheels/ (carry this folder)
#   bash benchmarks/gpu.sh run "$OUT"  there: ceilings, baselines, the tests, the demo run; results into the given folder
# There are no CUDA kernels yet: build, sanitizer and kernel timings join when there are.
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

run() {
  local out=${1:?usage: gpu.sh run OUT}
  mkdir -p "$out"
  nvidia-smi > "$out/nvidia-smi.txt"
  python3 -m venv --system-site-packages /tmp/gpu-venv
  # only what the image lacks: torch and transformers stay the image's own
  for wheel in .wheels/*.whl; do
    /tmp/gpu-venv/bin/python -m pip install --quiet --no-index --no-deps "$wheel"
  done
  export HF_HUB_OFFLINE=1 PYTHONPATH=$PWD
  /tmp/gpu-venv/bin/python benchmarks/gpu_ceilings.py --out "$out/gpu-ceilings.json" 2>&1 | tee "$out/ceilings.txt"
  timeout 240 /tmp/gpu-venv/bin/python -m pytest -m "not slow" tests/quant tests/algorithms tests/kernels tests/layers \
    tests/models tests/calibration tests/passes 2>&1 | tail -n 15 | tee "$out/tests.txt" || true
  timeout 180 /tmp/gpu-venv/bin/python -m compressor run recipes/int4_moe.yaml --out /tmp/gpu-demo > "$out/demo.md" 2> "$out/demo.err" || true
  cp /tmp/gpu-demo/report.json "$out/demo-report.json" || true
}

"${1:?usage: gpu.sh prepare | run OUT}" "${@:2}"
