# Two commands: `make serve` starts an engine with the plugin and asks it a question; `make test` tests everything.
# Both make their environment first (.venv/), once.

PYTHON ?= python3.11
ENGINE ?= vllm
VENV ?= .venv/$(ENGINE)
# An environment of your own that already holds the engine, this project and the test tools: nothing is installed.
USE_ENV ?=
# For `make test`, which needs one for each engine; USE_ENV alone is vLLM's.
USE_ENV_VLLM ?= $(USE_ENV)
USE_ENV_SGLANG ?=
USE_ENV_SGLANG_NEXT ?=
ENV := $(or $(USE_ENV),$(VENV))
RUN := $(ENV)/bin/python
PYTEST := $(RUN) -m pytest
# Tests use one thread each: on small shapes more of them only get in each other's way.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

export PYTHON ENGINE VENV USE_ENV MODEL PORT ARGS ONCE QUESTION TIMEOUT TORCH_CPU_INDEX DEVICE

.PHONY: help python serve test lint gpu-triton cpu-tests e2e-tests engine-tests own-tests proof environment clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:
	@echo "make serve        make the environment, start $(ENGINE) with the plugin, ask one question, stay up"
	@echo "                  ENGINE=vllm|sglang|sglang-next (SGLang 0.5.20 and 0.5.23)"
	@echo "                  MODEL=folder-or-hub-name PORT=8000 ARGS='--max-model-len 4096' ONCE=1 QUESTION='…'"
	@echo "                  TIMEOUT=seconds DEVICE=cpu|gpu TORCH_CPU_INDEX=url VENV=folder USE_ENV=your-environment"
	@echo "make test         everything: lint, types, unit and kernel tests, then each engine's own and end-to-end tests"
	@echo "                  USE_ENV_VLLM= USE_ENV_SGLANG= USE_ENV_SGLANG_NEXT= environments of yours, one an engine"
	@echo "make lint         ruff and mypy only"
	@echo "make cpu-tests    unit and kernel tests only      TESTS='tests/cpu/kernels -k norm' for some of them"
	@echo "make e2e-tests    end-to-end tests of ENGINE      TESTS=tests/e2e/test_x.py"
	@echo "make engine-tests ENGINE=sglang                   what needs that engine: its unit tests, then e2e-tests"
	@echo "make proof        the long versions of the tests; results in benchmarks/results/cpu/proof.json"
	@echo "make environment  only make the environment       make clean  remove it and all that was built"

environment: python
	@$(PYTHON) -m qwen3next_plugin.serve environment

serve: python
	@$(PYTHON) -m qwen3next_plugin.serve

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "FAILED: $(PYTHON) is missing or older than 3.11; name one with PYTHON=…" >&2; exit 1; }

# Lint, unit and kernel tests run once, in vLLM's environment; then each engine has its own tests in its own. The two
# engines' run side by side; under make itself this could not be seen happening (-j holds output back or mixes it).
ENGINE_MAKE = $(MAKE) --no-print-directory ENGINE=$(1) VENV=.venv/$(1) USE_ENV=$(2)

test: python
	+@$(PYTHON) tests/side_by_side.py \
	  "vllm=$(call ENGINE_MAKE,vllm,$(USE_ENV_VLLM)) lint cpu-tests e2e-tests" \
	  "sglang=$(call ENGINE_MAKE,sglang,$(USE_ENV_SGLANG)) engine-tests && \
	    $(call ENGINE_MAKE,sglang-next,$(USE_ENV_SGLANG_NEXT)) engine-tests"

lint: environment
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) tests/typecheck.py

# The Triton that the engines' CUDA builds of PyTorch 2.13 pin: kernels are compiled with it too, beside the one that
# PyTorch's CPU build brings. Not in an environment of yours.
GPU_TRITON := 3.7.1
TRITON_OF_GPUS := $(if $(USE_ENV),,$(CURDIR)/.venv/triton-$(GPU_TRITON))

gpu-triton: environment
	@test -z "$(TRITON_OF_GPUS)" || test -d "$(TRITON_OF_GPUS)/triton" || \
	  { $(RUN) -m pip install -q --no-deps --target "$(TRITON_OF_GPUS).part" triton==$(GPU_TRITON) && \
	    mv "$(TRITON_OF_GPUS).part" "$(TRITON_OF_GPUS)"; }

# Kernel tests run under Triton's interpreter (tests/conftest.py sets it); engines must not, so they are tested apart.
cpu-tests: environment gpu-triton
	$(ONE_THREAD) TRITON_OF_GPUS="$(TRITON_OF_GPUS)" $(PYTEST) $(or $(TESTS),tests --ignore=tests/e2e)

# Two versions of an engine share the combinations of setups out between them; each gets every point of the list.
# TESTS=tests/e2e runs all of them on either.
E2E_TESTS := tests/e2e $(if $(findstring -next,$(ENGINE)),-m quick,-m "not further")

e2e-tests: environment
	$(ONE_THREAD) TRITON_INTERPRET=0 $(PYTEST) $(or $(TESTS),$(E2E_TESTS))

# The tests that another engine's environment skips.
TESTS_OF_vllm := tests/cpu/vllm tests/cpu/doctor
TESTS_OF_sglang := tests/cpu/sglang tests/cpu/sglang_cpu tests/cpu/doctor
TESTS_OF_sglang-next := $(TESTS_OF_sglang)

engine-tests: own-tests e2e-tests

own-tests: environment
	$(ONE_THREAD) $(PYTEST) $(TESTS_OF_$(ENGINE))

proof: environment
	$(RUN) tests/proof.py $(TESTS)

clean:
	rm -rf .venv build dist tests/sglang_cpu/build tests/sglang_cpu/*.egg-info *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
