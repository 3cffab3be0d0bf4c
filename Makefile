# Every target makes the environment that it needs: nothing has to be installed before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Many small tensors: more threads than processes only wait for each other.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1

# Another torch, beside the pinned one. NUMPY is one of its constraints too, where it is given.
TORCH ?= 2.6.0
OTHER := .venv-torch-$(TORCH)
OTHER_PIP = . $(OTHER)/pip.sh && $(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check \
	-c $(OTHER)/constraints.txt

.PHONY: help bench bench-gpu bench-solvers demo test test-torch test-fast test-zoo check format docs readme-picture clean

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
	OMP_NUM_THREADS=1 $(BIN)/rai-toolbox evaluate --model digits --data digits --out demo-report

test: $(VENV)/.dev  ## every test and every docstring example
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

# A configuration of pip may have no such version, or an upper bound below it: then its index is asked without one.
$(OTHER)/.torch:
	$(PYTHON) -m venv $(OTHER)
	printf '%s\n' torch==$(TORCH) $(if $(NUMPY),numpy==$(NUMPY)) > $(OTHER)/constraints.txt
	: > $(OTHER)/pip.sh
	$(OTHER_PIP) torch==$(TORCH) numpy || { \
		echo "torch $(TORCH) is not to be had as pip is configured: trying without its configuration"; \
		echo "export PIP_CONFIG_FILE=/dev/null" > $(OTHER)/pip.sh; \
		$(OTHER_PIP) torch==$(TORCH) numpy; }
	$(OTHER_PIP) 'torchvision>=0.21' || echo "no torchvision fits torch $(TORCH): tests that use it are skipped"
	@touch $@

$(OTHER)/.dev: $(OTHER)/.torch pyproject.toml
	$(OTHER_PIP) -e '.[cli,demo,dev]'
	@if $(OTHER)/bin/python -c 'import torchvision' 2>/dev/null; then \
		echo "torchvision is there: with what reads ONNX files"; $(OTHER_PIP) -e '.[cli,demo,dev,onnx]'; \
	else echo "no torchvision: tests that read ONNX files are skipped"; fi
	@touch $@

test-torch: $(OTHER)/.dev  ## every test with another torch: make test-torch TORCH=2.6.0
	$(TEST_ENV) $(OTHER)/bin/python -m pytest -n 2 --dist loadgroup $(ARGS)

test-fast: $(VENV)/.dev  ## all but the slow ones
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not distributed and not browser and not zoo" $(ARGS)

test-zoo: $(VENV)/.dev  ## the checks on all models of the zoo
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m zoo tests/robustness/checks/test_zoo.py $(ARGS)

check: $(VENV)/.dev  ## format, lint, types, who imports whom, and sizes, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python tools/check_imports.py
	$(BIN)/python tools/check_sizes.py

format: $(VENV)/.dev  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e '.[docs]'
	@touch $@

# Warnings are errors, tutorials are run, and every public name must have a page. Their cells also run in `make test`.
docs: $(VENV)/.docs  ## build the site: docs/_build/html/index.html
	$(TEST_ENV) $(BIN)/python -m pytest -q src tests/docs
	$(TEST_ENV) $(BIN)/python -m sphinx -W --keep-going -E -b html docs docs/_build/html

readme-picture: demo  ## draw the picture of the README from what the demo has found
	$(BIN)/python docs/readme_picture.py demo-report docs/_static/demo.png

clean:  ## remove the environments and what runs have left
	rm -rf $(VENV) .venv-torch-* demo-report .pytest_cache .ruff_cache .hypothesis docs/_build docs/reference/generated

bench: $(VENV)/.dev  ## what a step costs, as ratios to plain SGD; OLDER=DIR for another version beside it; CASE=images for one case
	$(BIN)/python bench/optimizers.py $(if $(OLDER),--older $(OLDER)) $(addprefix --case ,$(CASE))
ifndef CASE
	$(BIN)/python bench/growth.py
	$(BIN)/python bench/gradient_ascent.py
endif

bench-gpu: $(VENV)/.dev  ## times on a GPU, into bench-results/gpu.md; fails, and says so, where there is none
	$(BIN)/python bench/gpu.py $(if $(OLDER),--older $(OLDER))

bench-solvers: $(VENV)/.dev  ## robust accuracy, optimality and model passes of the solvers; other libraries where installed
	$(BIN)/python bench/solvers.py
	$(BIN)/python bench/solver_optima.py --data 5 --seconds 2
