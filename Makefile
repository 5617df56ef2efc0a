# `make run` and `make test` are all the set-up there is: each brings the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: run test test-slow lint docs install install-run

# Two levels of one environment, each with a file that tells when it was installed: what the main job
# needs, and all hosts and tools of the tests. They are installed again when the requirements change.
RUN = $(VENV)/.installed-run
DEV = $(VENV)/.installed-dev

$(RUN): setup.cfg pyproject.toml
	@echo "Making an environment in $(VENV)."
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the package with torch, kornia and the libraries of the main job."
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --editable ".[examples]"
	@touch $@

$(DEV): $(RUN)
	@echo "Installing the hosts and tools of the tests as well: lightly, solo-learn's libraries, timm, ..."
	$(BIN)/python -m pip install --editable ".[dev]"
	@touch $@

install-run: $(RUN)

install: $(DEV)

# Options of the training: make run ARGS="--epochs 2".
run: install-run
	@echo "Training on real photographs, then evaluating: some two minutes on two cores."
	$(BIN)/python -m benchmarks.plain_pytorch $(ARGS)

# One process a core, and one thread in each; the tests of a file stay together. Files are taken in their
# own order: by their numbers of tests the longest, which start programs, would come last.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile \
	--no-loadscope-reorder

test: install
	$(PYTEST) -m "not slow"

test-slow: install
	$(PYTEST) -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every warning is an error. The tutorials are run: a minute or two.
docs: install
	@echo "Building the site and running its tutorials; the result is docs/_build/index.html."
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --nitpicky --fail-on-warning --keep-going docs docs/_build
