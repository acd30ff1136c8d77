PYTHON ?= python3.12
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help
help:
	@echo "make demo       quantize the reference model, run it, measure it"
	@echo "make test       the tests"
	@echo "make lint       ruff and mypy"
	@echo "make sass       what the compiled kernels execute, for each configuration"
	@echo "make test-vllm  vLLM's own loader on our exports (builds a 6 GB environment, once)"
	@echo "make clean      remove environments and caches"

include tests/oracle/oracle.mk
include tests/sass/sass.mk
include tests/vllm/vllm.mk
include experiments/llm_compressor/llm_compressor.mk

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip --disable-pip-version-check --quiet install -e '.[dev]'
	touch $@

.PHONY: demo test lint clean
demo: $(READY)
	$(BIN)/python experiments/demo.py

test: $(READY) oracle-env sass-env
	$(BIN)/python -m pytest -m "not vllm" --durations=10 --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-oracle test-vllm: $(READY)

clean:
	rm -rf .venv .venv-oracle .venv-sass .venv-vllm .venv-llmcompressor demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache
