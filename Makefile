# The two commands of the README are `make demo` and `make test`; both prepare .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/dev.txt

.PHONY: demo test lint format lock clean

demo: $(VENV)/ready
	$(BIN)/python -m demo

test: lint
	$(BIN)/pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One environment for everything, from the lock file, every wheel checked against its hash.
$(VENV)/ready: $(LOCK) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing: install Python 3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r $(LOCK)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# Lock anew after a change of pyproject.toml's dependencies.
EXTRAS := $(foreach extra,train serve cluster demo dev,--extra $(extra))
lock: $(VENV)/ready
	$(BIN)/uv pip compile pyproject.toml $(EXTRAS) --universal --generate-hashes --no-header -q -o $(LOCK)

clean:
	rm -rf build runs .pytest_cache .mypy_cache .ruff_cache
