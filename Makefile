# One command does all the set-up: `make duel` and `make test` need only Python, pip and make.
# A stamp file in the virtual environment marks each finished step, so a second run starts at once.
#
#   make duel ARGS="--quick"            options for recipes/compare_peft.py
#   make test ARGS="tests/test_units.py"    options for pytest
#   make test VENV=/path/to/venv PYTHON=python3.12
#   make test-integration VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
#   make test-prerelease    fails nothing: its last line is the result

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TEST_JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP_FLAGS ?=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c $(CONSTRAINTS)
PYTEST := $(BIN)/python -m pytest
METADATA := setup.cfg pyproject.toml $(CONSTRAINTS)

.PHONY: help venv install duel test test-integration test-prerelease test-gpu quality notebooks clean

help:
	@echo "make duel              set up, then train the same adapter with stock PEFT, QLoRA and hf_lema, and compare"
	@echo "make test              set up, then the tests that need no GPU and no patience"
	@echo "make test-integration  set up, then only the tests that go through transformers, peft, accelerate and trl"
	@echo "make test-prerelease   the same with the newest of these that the registry has, pre-releases too; fails nothing"
	@echo "make test-gpu          set up, then the tests that need a CUDA device"
	@echo "make quality           set up, then ruff (rules and format) and mypy"
	@echo "make notebooks         set up, then run every notebook from top to bottom, small, on the CPU"
	@echo "make install           set up for the recipes; make venv: only the empty virtual environment"
	@echo "make clean             remove caches, build output and .venv"

venv: $(STAMPS)/venv
install: $(STAMPS)/recipes

duel: $(STAMPS)/recipes
	$(BIN)/python recipes/compare_peft.py $(ARGS)

test: $(STAMPS)/test
	$(PYTEST) -n $(TEST_JOBS) --dist worksteal -m "not gpu and not slow" $(ARGS)

test-integration: $(STAMPS)/test
	$(PYTEST) -n $(TEST_JOBS) --dist worksteal -m "integration and not gpu and not slow" $(ARGS)

# What moves fast is taken from the registry as it is now; everything else stays as it is tested. The constraints are
# written anew, so that a second run upgrades.
MOVING := accelerate|huggingface_hub|peft|tokenizers|transformers|trl
test-prerelease: VENV := .venv-prerelease
test-prerelease:
	@grep -vE '^($(MOVING))==' constraints.txt > $(VENV).txt
	@$(MAKE) --no-print-directory test-integration VENV=$(VENV) CONSTRAINTS=$(VENV).txt PIP_FLAGS="--pre --upgrade" \
		ARGS='$(ARGS)' && result=passed || result=FAILED; \
	$(VENV)/bin/python -m pip --disable-pip-version-check freeze | grep -E '^($(MOVING))=='; \
	echo "test-prerelease: $$result with these versions (which fails nothing else)"

test-gpu: $(STAMPS)/test
	$(PYTEST) -m gpu $(ARGS)

quality: $(STAMPS)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

notebooks: $(STAMPS)/test
	$(BIN)/python recipes/run_notebooks.py $(ARGS)

clean:
	rm -rf .venv .venv-prerelease .venv-prerelease.txt build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find hf_lema recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Where Python comes without ensurepip (Debian's python3 without python3-venv), pip is put in from outside.
$(STAMPS)/venv:
	@echo "Creating the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
		|| { rm -rf $(VENV)/pyvenv.cfg && $(PYTHON) -m venv --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@mkdir -p $(STAMPS) && touch $@

# torch alone and first: the version in the constraints decides, not whatever another package would pull.
$(STAMPS)/torch: $(STAMPS)/venv $(CONSTRAINTS)
	@echo "Installing torch (once; this is the long download)"
	$(PIP) torch
	@touch $@

$(STAMPS)/recipes: $(STAMPS)/torch $(METADATA)
	$(PIP) -e ".[qlora,report,demo]"
	@touch $@

$(STAMPS)/test: $(STAMPS)/torch $(METADATA)
	$(PIP) -e ".[qlora,report,demo,test]"
	@touch $@ $(STAMPS)/recipes

$(STAMPS)/dev: $(STAMPS)/torch $(METADATA)
	$(PIP) -e ".[qlora,report,demo,test,dev]"
	@touch $@ $(STAMPS)/recipes $(STAMPS)/test
