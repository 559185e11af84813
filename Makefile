# Two commands do everything on a fresh machine: `make demo` and `make test`. `make venv` only makes the environment.
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := .venv/installed
CT_NEWEST := .venv/ct-newest

.PHONY: venv demo test test-fast lint clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv || { rm -rf .venv; $(PYTHON) -m venv --without-pip .venv && $(BIN)/python scripts/bootstrap_pip.py; }
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) -e '.[dev]'
	rm -rf $(CT_NEWEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(CT_NEWEST) compressed-tensors==0.20.0
	touch $@

demo: $(STAMP)
	$(BIN)/quantpub demo -o demo-out

test: $(STAMP) lint
	$(BIN)/python -m pytest -q

test-fast: $(STAMP)
	$(BIN)/python -m pytest -q -m 'not slow'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
