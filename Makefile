# Every target sets up what it needs and runs. The second run finds the stamps and starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What `make test` hands to pytest: make test ARGS="-x tests/docs/test_docs.py"
ARGS ?=
# What the tests need: the library, what it works with, and what it is compared with, as far as that installs.
TESTED := $(VENV)/demo.stamp $(VENV)/frameworks.stamp $(VENV)/test.stamp $(VENV)/peers.stamp
# The tests whose results are floats.
NUMERIC := cheap_modes engines further_batches geometry_* graddrop gradnorm methods playground precision priority_methods reference \
	row_averages row_methods_alike weighting_*
# A process for each core. Files stay whole: what is spawned or trained once for a file is then done once. The order is
# that of tests/conftest.py, long files first.
PARALLEL ?= -n auto --dist loadfile --no-loadscope-reorder

# How long `make explore` compares settings with the literal reference.
MINUTES ?= 10

# Tests start dozens of processes, each of which would compile the library anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
# Two pips at once would break each other's environment, and two cores are busy with one target anyway.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-old-processor test-browser explore lint format docs bench bench-compare structure bench-joined bench-engines bench-middle bench-per-sample bench-compiled gpu bench-solvers mutants published conformance evidence clean

help: ## Say what the targets are
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

demo: $(VENV)/demo.stamp ## Train on two losses of very different size, method by method (ARGS=--quick for a first look)
	$(BIN)/python -m gradsurgery demo $(ARGS)

test: $(TESTED) ## Run the tests that are not slow
	$(BIN)/python -m pytest -m "not slow and not browser" $(PARALLEL) $(ARGS)

test-all: $(TESTED) ## Run the slow tests too
	$(BIN)/python -m pytest -m "not browser" $(PARALLEL) $(ARGS)

# Every switch of torch, numpy and OpenBLAS for plainer instructions at once; a processor that lacks one ignores it.
test-old-processor: $(TESTED) ## Run the numeric tests with the instructions of an older processor
	ATEN_CPU_CAPABILITY=default OPENBLAS_CORETYPE=Prescott \
	NPY_DISABLE_CPU_FEATURES="$$($(BIN)/python -c 'from numpy import show_config as c; print(*c("dicts")["SIMD Extensions"].get("found", []))')" \
	$(BIN)/python -m pytest -m "not slow and not browser" $(PARALLEL) $(addprefix tests/*/test_,$(addsuffix .py,$(NUMERIC))) $(ARGS)

# Draws are the same in every run elsewhere. What fails is printed with the line that repeats it, and tried first next time.
explore: $(TESTED) ## Draw new examples for the tests that draw, and new settings for the literal reference (MINUTES=240 for hours)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.literal --minutes $(MINUTES)
	EXPLORE=1 $(BIN)/python -m pytest -m "not browser" $(PARALLEL) $$(grep -l hypothesis tests/*/test_*.py) $(ARGS)

test-browser: $(VENV)/demo.stamp $(VENV)/test.stamp $(VENV)/docs.stamp $(VENV)/browser.stamp ## Test the playground in Chromium, which must be installed
	$(BIN)/python -m pytest -m browser tests/docs/test_playground_browser.py $(ARGS)

# All four checks run, so that one report shows all there is to mend.
lint: $(VENV)/demo.stamp $(VENV)/lint.stamp ## Check format, style, types and documented arguments
	@status=0; \
	for check in "ruff format --check ." "ruff check ." "mypy" "flake8 gradsurgery"; do \
		echo "$$check"; $(BIN)/$$check || status=1; \
	done; \
	exit $$status

format: $(VENV)/lint.stamp ## Format the code and apply the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# All pages are written (-a), since each shows the titles of the others.
docs: $(VENV)/demo.stamp $(VENV)/docs.stamp ## Build the pages into docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -a -n -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/demo.stamp $(VENV)/peers.stamp ## Measure the cost of a step, against other libraries
	$(BIN)/python -m benchmarks.steps $(ARGS)

bench-compare: $(VENV)/demo.stamp ## Compare the speed of this tree with that of another commit (BASE=HEAD~1, ARGS=--quick)
	$(BIN)/python -m benchmarks.compare $(BASE) $(ARGS)

structure: $(VENV)/demo.stamp $(VENV)/lint.stamp ## Count what a step enters, and how complex it is
	$(BIN)/python -m benchmarks.structure $(ARGS)

bench-joined: $(VENV)/demo.stamp ## Measure what joined losses cost beside separate ones
	$(BIN)/python -m benchmarks.joined $(ARGS)

bench-engines: $(VENV)/demo.stamp ## Measure whether "auto" takes the fastest engine (ARGS="--json docs/engines.json")
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.engines $(ARGS)

bench-middle: $(VENV)/demo.stamp ## Measure what a step of models of middle size costs (ARGS="--json docs/middle.json")
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.middle $(ARGS)

bench-compiled: $(VENV)/demo.stamp ## Time steps of compiled models: plain sum, weighters, surgery
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.compiled $(ARGS)

gpu: $(VENV)/test.stamp $(VENV)/peers.stamp ## Measure and test on a GPU, in 8 minutes (ARGS="--device cpu --quick" tries the script)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

bench-per-sample: $(VENV)/peers.stamp ## Measure what one loss per sample costs beside a plain backward pass (ARGS=--quick)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.per_sample $(ARGS)

# One thread: on matrices this small, waiting for a second one costs more than it brings.
bench-solvers: $(VENV)/peers.stamp ## Time the methods against TorchJD's on the same matrices
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.solvers $(ARGS)

mutants: $(TESTED) ## Change single operators of the core, and name the changes that no test notices (ARGS="--files step --count 40")
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mutants $(ARGS)

published: $(VENV)/demo.stamp ## Reproduce what papers show on small problems (ARGS=--quick for a first look)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.published $(ARGS)

conformance: $(VENV)/peers.stamp ## Ask this library and others about every known defect
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.conformance $(ARGS)

# The library's own threads would fight with the trainings that run side by side.
evidence: $(VENV)/demo.stamp ## Train with all methods on real problems; hours, goes on where it stopped (ARGS=--quick for minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.evidence $(ARGS)

clean: ## Remove the environment, the caches and the built pages
	rm -rf $(VENV) docs/_build docs/reference .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The package is installed in place, with one group of extras per stamp. Constraints do not reach into an isolated build, so
# the build tools are pinned and installed like everything else.
$(VENV)/%.stamp: pyproject.toml constraints.txt $(VENV)/build.stamp
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e '.[$*]'
	@touch $@

# Not every peer installs on every Python and processor. Those that do are installed, one by one if need be; tests and
# benchmarks name those that are missing.
$(VENV)/peers.stamp: $(VENV)/demo.stamp
	@$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e '.[peers]' || \
	for peer in $$($(BIN)/python -m benchmarks.peers); do \
		$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt "$$peer" || echo "Goes on without $$peer."; \
	done
	@touch $@

$(VENV)/build.stamp: constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV); with torch this takes a few minutes, once."
	$(BIN)/python -m pip install -q -c constraints.txt hatchling editables
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
