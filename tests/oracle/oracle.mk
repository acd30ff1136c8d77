# The environment of the oracle tests: torch for CPU, transformers, compressed-tensors. 1.2 GB, once.
# Without it the tests skip, so that failing to build it fails nothing.
ORACLE_ENV := .venv-oracle
ORACLE_READY := $(ORACLE_ENV)/.ready
# A Python that torch's CPU build is at hand for. By default python3.11, pyenv's included.
ORACLE_PYTHON ?=
# "+cpu" is a guard: indexes that carry the CUDA build alone (3 GB and more) do not have it, and pip finds nothing.
ORACLE_TORCH ?= torch==2.13.0+cpu

.PHONY: oracle-env test-oracle
oracle-env:
	@test -e $(ORACLE_READY) -a ! tests/oracle/requirements.txt -nt $(ORACLE_READY) \
	|| bash tests/oracle/build_environment.sh "$(ORACLE_ENV)" "$(ORACLE_TORCH)" "$(ORACLE_PYTHON)" \
	|| echo "oracle: no environment for torch could be made; the tests that compare with it will skip"

test-oracle: oracle-env
	.venv/bin/python -m pytest -m oracle tests/oracle
