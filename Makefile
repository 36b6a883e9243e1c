# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-v1 test-kernels test-v2 test-slow lint types setup clean

demo: setup
	$(BIN)/proxy-vllm demo

# Two suites at once: an engine of the tests has one thread.
test: setup
	@echo "Two suites run at once, and each is printed when it ends; make test-v1 shows one as it runs."
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=line test-v1 test-kernels test-v2

# The runner is chosen when Triton is imported, so the suite runs in a process for each runner, and
# one for the kernels. What does not depend on the runner runs once.
RUNNER_FREE := bench_cli_e2e bench_multi_gpu bench_own_prompts generate plan_e2e ray_batch server
test-v1: setup
	$(BIN)/python -m pytest tests --ignore=tests/kernels -m "not slow"

test-kernels: setup
	PROXY_VLLM_CPU_RUNNER=v2 $(BIN)/python -m pytest tests/kernels -m "not slow"

test-v2: setup
	PROXY_VLLM_CPU_RUNNER=v2 $(BIN)/python -m pytest tests/e2e -m "not slow" \
	  $(RUNNER_FREE:%=--ignore=tests/e2e/test_%.py)

# What takes minutes each: benchmarks end to end, data parallel servers, every kernel for sm_90.
test-slow: setup
	$(BIN)/python -m pytest tests --ignore=tests/kernels -m slow
	PROXY_VLLM_CPU_RUNNER=v2 $(BIN)/python -m pytest tests/kernels -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy proxy_vllm

setup: $(VENV)/.done

# The stamp holds the lock it was made from: a second run re-uses the environment, a changed lock
# brings it up to date.
$(VENV)/.done: requirements/cpu.lock setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps "torch==$(TORCH)+cpu" \
	  || $(BIN)/python -m pip install --quiet --no-deps --index-url $(TORCH_CPU_INDEX) "torch==$(TORCH)+cpu"
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
