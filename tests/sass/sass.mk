# The environment of the SASS tests: JAX with CUDA's compiler, without its libraries. Needs no GPU; 1.4 GB of disk, once.
# Without it the tests skip, so that failing to build it fails nothing.
SASS_ENV := .venv-sass
SASS_READY := $(SASS_ENV)/.ready
SASS_PIP := $(SASS_ENV)/bin/pip --disable-pip-version-check --quiet

.PHONY: sass-env test-sass sass
sass-env:
	@test -e $(SASS_READY) -a ! tests/sass/requirements.txt -nt $(SASS_READY) \
	|| { echo "sass: making $(SASS_ENV) (270 MB to download)" \
		&& rm -rf $(SASS_ENV) && $(PYTHON) -m venv $(SASS_ENV) \
		&& $(SASS_PIP) install --no-deps -r tests/sass/requirements.txt && touch $(SASS_READY); } \
	|| echo "sass: no environment with CUDA's compiler could be made; the tests of compiled kernels will skip"

test-sass: $(READY) sass-env
	$(BIN)/python -m pytest -m sass tests/sass

# A table of all configurations.
sass: $(READY) sass-env
	$(BIN)/python tests/sass/audit.py
