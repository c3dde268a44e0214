# Two commands on a fresh machine, each making its own .venv: `make demo` and `make test`. `make test` takes a few
# minutes; `make test-all` runs every case, compiled with all optimisations.
PYTHON ?= python3
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Targets share one .venv.
.NOTPARALLEL:
.PHONY: demo test test-full test-all oracle tpu lint format picture notebooks clean

demo: .venv/train
	$(BIN)/python configs/toy_lm.py

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not full"

# The cases that `make test` leaves out.
test-full: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal --optimized -m "full"

test-all: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal --optimized

oracle: .venv/oracle
	$(BIN)/python -m pytest --optimized -m oracle -s tests/oracle

tpu: .venv/test,tpu
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest --optimized tests/core/test_kernels_tpu.py tests/attention/test_splash_tpu.py \
		tests/programs/test_benchmarks_tpu.py \
		tests/programs/test_ahead_of_time.py tests/programs/test_benchmarks_scale.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

picture: .venv/train
	$(BIN)/python notebooks/overview.py

notebooks: .venv/notebooks
	$(BIN)/python notebooks/execute.py

.venv/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rope_jax needs Python 3.11 or newer, got " + sys.version)'
	$(PYTHON) -m venv .venv
	touch $@

# One stamp per set of extras; it is stale when the list of dependencies changes.
.venv/%: pyproject.toml | .venv/pip
	$(INSTALL) --editable ".[$*]"
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
