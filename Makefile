# Two commands do everything on a fresh machine: `make demo` and `make test`. `make venv` only makes the environment.
# The first of these that runs and is new enough
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := .venv/installed
CT_NEWEST := .venv/ct-newest
# Two processes, a file of tests in one of them: most tests use one core
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: venv demo test test-fast lint clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer | install one, or say make PYTHON=/path/to/python" >&2; exit 6; }
	sh scripts/make_venv.sh $(PYTHON) .venv
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) -e '.[dev]'
	rm -rf $(CT_NEWEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(CT_NEWEST) compressed-tensors==0.20.0
	touch $@

demo: $(STAMP)
	$(BIN)/quantpub demo -o demo-out

test: $(STAMP) lint
	$(PYTEST)

test-fast: $(STAMP)
	$(PYTEST) -m 'not slow'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
