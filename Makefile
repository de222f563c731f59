# `make demo` and `make test` are all a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin
# The folders profiling and models are parts of the package: the root must not be searched for modules.
pytest engines quiet: export PYTHONSAFEPATH = 1
# Images often set it; but hundreds of child processes would each compile anew what they import.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test pytest packages docs engines fuzz peers quiet lint typecheck clean

# What is imported is compiled then; thousands of modules that nobody imports are not.
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

.venv/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e '.[exact,report]'
	touch $@

.venv/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e '.[dev]'
	touch .venv/.core $@

demo: .venv/.core
	$(BIN)/gemopt demo

test: lint typecheck pytest

# torch's ranks ask for the name of 127.0.0.1 dozens of times; an answer that is lost shall cost one second, not five.
# Two processes, whole files each: a file's tests share what is slow to make.
pytest: .venv/.dev
	RES_OPTIONS=timeout:1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy needs one tree: links to the three source folders.
typecheck: .venv/.dev
	rm -rf build/typecheck && mkdir -p build/typecheck
	cp -rs $(CURDIR)/gemopt build/typecheck/gemopt
	cp -rs $(CURDIR)/models build/typecheck/gemopt/models
	cp -rs $(CURDIR)/profiling build/typecheck/gemopt/profiling
	$(BIN)/mypy build/typecheck/gemopt

# Wheel and sdist in clean environments, one per Python on the path.
packages:
	.ci/packages

# The site, with warnings as errors, in build/site.
docs: .venv/.dev
	$(BIN)/mkdocs build --strict

engines: .venv/.dev
	$(BIN)/python -m pytest -m engines

# The public benchmark, cell by cell: stop and start it at will. About an hour of one core; 400 MB of wheels, once.
peers: .venv/.dev
	$(BIN)/python benchmarks/peers/run.py

quiet: .venv/.dev
	$(BIN)/python -m pytest -m quiet

# About an hour of one core: bounds and solvers against trying all placements, 1e5 random tiny problems in all.
FUZZ_SEED ?= 1000000
fuzz: .venv/.dev
	for run in bounds:60000 local-search:5000 auto:5000 cpsat:15000 highs:10000 cbc:5000 branch:5000 columns:5000; do \
		$(BIN)/python tests/fuzz/fuzz.py --solver $${run%:*} --n $${run#*:} --seed $(FUZZ_SEED) || exit 1; done

clean:
	rm -rf build out .pytest_cache .mypy_cache .ruff_cache
