# Every target sets up .venv by itself and needs only Python 3.11+ (make PYTHON=python3.12 ...), a C++ compiler for `demo`
# and `test`, and a package index. Where the index offers torch built for CUDA only and you want the CPU build, or the other
# way round, name the index that has it: make PIP_TORCH_ARGS="--index-url ..." test

PYTHON ?= python3
PIP_TORCH_ARGS ?=
ARGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TYPES := build/types
TRITON := triton==3.6.0

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint types format bench clean

help:
	@echo "make demo | test | lint | types | format | bench | clean    (ARGS=... is passed on to demo, test and bench)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: resolved together with the rest, another build of it could be pulled in. A CUDA build brings
# its own triton; beside a CPU build, where there is a wheel, comes the one that compiles our GPU kernels in the tests.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP_INSTALL) $(PIP_TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -c 'import triton' 2>/dev/null || test "$$(uname -sm)" != "Linux x86_64" || $(PIP_INSTALL) "$(TRITON)"
	@touch $@

$(VENV)/.extra-%: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) -e '.[$*]'
	@touch $@

.PRECIOUS: $(VENV)/.torch $(VENV)/.extra-%

demo: $(VENV)/.extra-demo
	$(BIN)/bitdelta demo --out demo-output $(ARGS)

# Most of the time goes into compilers: processes side by side, whose threads do not spin while they wait.
test: $(VENV)/.extra-test
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(WORKERS) --dist worksteal --durations=10 $(ARGS)

lint: $(VENV)/.extra-lint types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# kernels/ and lowering/ stand at the top level and are installed inside bitdelta_compile: mypy sees a tree of links that
# looks like the installed package.
types: $(VENV)/.extra-lint
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/bitdelta_compile
	@ln -s $(CURDIR)/bitdelta_compile/* $(CURDIR)/kernels $(CURDIR)/lowering $(TYPES)/bitdelta_compile/
	MYPYPATH=$(TYPES) $(BIN)/mypy --cache-dir build/mypy -p bitdelta_compile -p benchmarks

format: $(VENV)/.extra-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.extra-bench
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output benchmarks/out .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
