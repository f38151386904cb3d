# Every target can run first on a fresh clone: each depends on `setup`, which is quick once done.
#   make demo       the main job on real data (writes flatkern-demo/)
#   make test       the tests (under 10 minutes on two cores)
#   make docs       the documentation site (build/site/index.html)
# A CUDA user overrides the pinned torch:  make setup CONSTRAINTS=my-constraints.txt
SHELL       := /bin/bash
PYTHON      ?= python3
CONSTRAINTS ?= requirements/constraints.txt
VENV        := .venv
BIN         := $(VENV)/bin
WORKERS     ?= 2
WHEEL_TORCH ?= 2.13.0 2.14.1
PYTEST      := $(BIN)/python -m pytest
SOURCES     := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# a failed build of the compiled side is an error here, never a silent fall-back
export FLATKERN_BUILD := required

.PHONY: setup demo test test-all test-sanitize lint format bench peers docs docs-setup cuda-check gpu-check wheel-check clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile; echo "also: setup test-all test-sanitize lint format bench peers docs-setup cuda-check gpu-check wheel-check clean"

$(VENV)/.deps: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "flatkern needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the requirements into $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) \
	    $$($(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; o = p["optional-dependencies"]; print(*p["dependencies"], *(r for g in ("demo", "test", "lint", "build") for r in o[g]))')
	@touch $@

$(VENV)/.build: $(VENV)/.deps setup.py CMakeLists.txt $(SOURCES)
	@echo "building the kernels ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# --no-deps: they name torchvision, whose wheels on PyPI do not import beside a CPU torch, and none imports it
$(VENV)/.peers: $(VENV)/.build pyproject.toml
	@echo "installing the packages that flatkern is compared with into $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps \
	    $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["peers"])')
	@touch $@

$(VENV)/.docs: $(VENV)/.build pyproject.toml
	@echo "installing the site's packages into $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check \
	    $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

setup: $(VENV)/.build

docs-setup: $(VENV)/.docs

# --strict: a broken link, anchor or cross-reference is an error
docs: docs-setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

peers: $(VENV)/.peers

demo: setup
	$(BIN)/flatkern demo

test: setup
	$(PYTEST) -m "not slow" -n $(WORKERS) --dist loadfile

test-all: setup
	$(PYTEST)

# the C++ tests of every instruction set, and of the CUDA kernels on the host, under AddressSanitizer and
# UndefinedBehaviorSanitizer; needs CMake alone
test-sanitize:
	cmake -S . -B build/sanitize -DFLATKERN_SANITIZE=ON -DFLATKERN_NVCC=FLATKERN_NVCC-NOTFOUND
	cmake --build build/sanitize --parallel 2
	ctest --test-dir build/sanitize --output-on-failure --parallel 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

bench: setup
	$(PYTEST) benchmarks --benchmark-enable

cuda-check: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash csrc/cuda/check.sh

# on a machine with a GPU, in an environment of its own (PYTHON); csrc/cuda/gpu_check.sh says what it needs
gpu-check:
	PYTHON="$(PYTHON)" bash csrc/cuda/gpu_check.sh

# one wheel in fresh environments with each of these torches, built beside the first; not in CI: 5 GB for the second
wheel-check:
	$(PYTHON) tests/wheel/check.py $(WHEEL_TORCH)

clean:
	rm -rf $(VENV) build dist *.egg-info flatkern-demo flatkern/*.so flatkern/_build_info.json .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
