# Every target makes the environment that it needs: nothing has to be installed before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Many small tensors: more threads than processes only wait for each other.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: help demo test test-fast check format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# torch first and by itself: the pinned build, and nothing that another package would drag in.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 numpy
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[cli,demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[cli,demo,dev]'
	@touch $@

demo: $(VENV)/.demo  ## train a digit classifier, measure its robustness, write a report
	$(BIN)/rai-toolbox evaluate --model digits --data digits --out demo-report

test: $(VENV)/.dev  ## every test and every docstring example
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 $(ARGS)

test-fast: $(VENV)/.dev  ## all but the slow ones
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not slow and not distributed and not browser" $(ARGS)

check: $(VENV)/.dev  ## format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.dev  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and what runs have left
	rm -rf $(VENV) demo-report .pytest_cache .ruff_cache .hypothesis
