# The environment of llm-compressor, which experiments/llm_compressor/compare.py measures: 1.5 GB, once.
LLMC_ENV := .venv-llmcompressor
LLMC_READY := $(LLMC_ENV)/.ready
LLMC_REQUIREMENTS := experiments/llm_compressor/requirements.txt

.PHONY: llm-compressor-env
llm-compressor-env:
	@test -e $(LLMC_READY) -a ! $(LLMC_REQUIREMENTS) -nt $(LLMC_READY) \
	|| bash tests/oracle/build_environment.sh "$(LLMC_ENV)" "$(ORACLE_TORCH)" "$(ORACLE_PYTHON)" $(LLMC_REQUIREMENTS)
