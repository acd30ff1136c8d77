# `make test-vllm`: vLLM's own loader reads what this project exports. Needs no GPU; 6 GB of disk, once.
VLLM_ENV := .venv-vllm
VLLM_READY := $(VLLM_ENV)/.ready
VLLM_PYTHON ?= python3.12
VLLM_PIP := $(VLLM_ENV)/bin/pip --disable-pip-version-check --quiet

# vLLM comes without its own dependencies: most are for serving, and would double the size.
$(VLLM_READY): tests/vllm/requirements.txt
	rm -rf $(VLLM_ENV)
	$(VLLM_PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_PIP) install -r $<
	$(VLLM_PIP) install --no-deps vllm==0.26.0
	touch $@

.PHONY: test-vllm
test-vllm: $(VLLM_READY)
	.venv/bin/python -m pytest -m vllm tests/vllm
