# On a fresh machine: `make demo` and `make test`. Both set up .venv first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A working tree that borrows the environment of another one still runs its own code.
export PYTHONPATH := $(CURDIR)

.DEFAULT_GOAL := help
.PHONY: help demo quick test test-v1 test-rest test-kernels test-v2 test-device test-slow lint types format hooks \
  setup install browser clean

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-14s %s\n", $$1, $$2}'

demo: setup  ## the trained trio in the box against its three baselines (2 minutes)
	$(BIN)/proxy-vllm demo

quick: setup  ## unit tests, which start no engine (a minute)
	$(BIN)/python -m pytest tests/unit -q -m "not slow" -n 2 --dist loadscope

# Two suites at once: an engine of the tests has one thread.
test: setup  ## the whole suite, on both runners
	@echo "Two suites run at once, and each is printed when it ends; make test-v1 shows one as it runs."
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=line --keep-going \
	  test-v1 test-rest test-kernels test-v2 test-device

# The runner is chosen when Triton is imported, so the suite runs in a process for each runner, and
# one for the kernels. What does not depend on the runner runs once.
RUNNER_FREE := bench_cli_e2e bench_multi_gpu bench_own_prompts demo_e2e generate plan_e2e ray_batch \
  remote_base server twin_server wheel
test-v1: setup  ## end-to-end tests on vLLM's V1 runner (CPU users)
	$(BIN)/python -m pytest tests/e2e -m "not slow"

test-rest: setup  ## unit tests, compat, twins of real families, bases elsewhere: on vLLM's V1 runner
	$(BIN)/python -m pytest tests --ignore=tests/kernels --ignore=tests/e2e --ignore=tests/pretended_device \
	  -m "not slow"

test-kernels: setup  ## the Triton kernels, in Triton's interpreter
	PROXY_VLLM_CPU_RUNNER=v2 $(BIN)/python -m pytest tests/kernels -m "not slow"

test-v2: setup  ## end-to-end tests on Model Runner V2 (GPU users), in Triton's interpreter
	PROXY_VLLM_CPU_RUNNER=v2 $(BIN)/python -m pytest tests/e2e -m "not slow" \
	  $(RUNNER_FREE:%=--ignore=tests/e2e/test_%.py)

test-device: setup  ## Model Runner V2 on a pretended GPU, which tells of waits and mixed devices
	PRETENDED_DEVICE=1 PROXY_VLLM_CPU_RUNNER=v2 $(BIN)/python -m pytest tests/pretended_device

test-slow: setup  ## what takes minutes each: benchmarks, data parallel servers, kernels for sm_90
	$(BIN)/python -m pytest tests --ignore=tests/kernels -m slow
	PROXY_VLLM_CPU_RUNNER=v2 $(BIN)/python -m pytest tests/kernels tests/e2e/test_families.py -m slow
	for runner in v1 v2; do PROXY_VLLM_CPU_RUNNER=$$runner \
	  PYTHONPATH=$(CURDIR):$(CURDIR)/tests/torchvision_stub $(BIN)/python -m pytest -m slow \
	  tests/e2e/test_families.py -k "wrapper or qwen3_5" || exit 1; done

compat: setup  ## WHEEL=0.33.0, a wheel or a folder: what that vLLM lacks that we use, by its source
	$(BIN)/python tests/compat/source_check.py $(WHEEL)

lint: setup  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy
	$(BIN)/mypy proxy_vllm

format: setup  ## ruff puts the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: setup  ## git runs lint and types before a commit, and `make quick` before a push
	$(BIN)/pre-commit install --install-hooks --hook-type pre-commit --hook-type pre-push

# The stamp is a copy of the files that the environment was made from. Contents are compared and not
# dates, which a checkout sets anew.
MADE_FROM := requirements/cpu.lock pyproject.toml setup.py
setup:  ## .venv, where it is missing or was made from other requirements
	@cat $(MADE_FROM) | cmp -s - $(VENV)/.done || $(MAKE) --no-print-directory install

# Packages alone: pip must not take this folder for an installed package.
install: export PYTHONPATH :=
install:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps "torch==$(TORCH)+cpu" \
	  || $(BIN)/python -m pip install --quiet --no-deps --index-url $(TORCH_CPU_INDEX) "torch==$(TORCH)+cpu"
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(MAKE) --no-print-directory browser
	cat $(MADE_FROM) > $(VENV)/.done

browser:  ## Chromium, for tests of pages: apt-get brings it where it is missing
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null \
	  || command -v google-chrome >/dev/null \
	  || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -qq -y chromium; } \
	  || echo "Chromium is missing, and only root may install it here: tests of pages will be skipped"

clean:  ## remove .venv and what builds leave behind
	rm -rf $(VENV) build dist *.egg-info
