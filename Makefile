# Every verb works on a fresh machine: it makes .venv unless an environment is active.
PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
PY := $(VENV)/bin/python
# One mark for each checkout that was installed into the environment.
INSTALLED := $(VENV)/.installed$(subst /,-,$(CURDIR))
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: install demo test bench lint

install: $(INSTALLED)

$(PY):
	$(PYTHON) -m venv $(VENV)

# torch comes first: the extension is built against the torch that is installed.
$(INSTALLED): $(SOURCES) | $(PY)
	$(PY) -c "import torch, torchvision" 2>/dev/null || $(PY) -m pip install torch torchvision
	$(PY) -m pip install -e ".[dev]"
	touch $@

demo: install
	$(PY) examples/demo.py

test: install
	$(PY) -m pytest -rs

bench: install
	$(PY) -m pytest bench --benchmark-only

lint: install
	$(PY) -m ruff check .
