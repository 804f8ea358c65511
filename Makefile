# `make quickstart` and `make test` need nothing but Python 3.11 or newer: each builds .venv first.

PYTHON := .venv/bin/python
CPP := $(wildcard ling_jax/kernels/*.h ling_jax/kernels/*.cc tests/support/*.h)
CXX ?= c++
# Two processes, which end the session if one of them crashes: pytest-xdist would wait for its tests for ever.
PYTEST := $(PYTHON) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
# Huge pages, and no memory given back between steps: a 128 MB array costs 32,769 page faults without, 65 with them.
# Only glibc reads this; elsewhere it does nothing.
MALLOC := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0
MALLOC := $(MALLOC):glibc.malloc.trim_threshold=100000000000:glibc.malloc.top_pad=268435456:glibc.malloc.arena_max=1

# `make quickstart CUDA=1` puts JAX for NVIDIA GPUs into .venv.
REQUIREMENTS := requirements$(if $(filter 1,$(CUDA)),-cuda)

.PHONY: help quickstart test test-fast nightly lint lint-format lint-rules lint-types lint-cpp format

help:
	@echo "make quickstart   train configs/ling_tiny.py on real text, then continue a prompt"
	@echo "                  CUDA=1: with JAX for NVIDIA GPUs (docs/gpus.md)"
	@echo "make test         the whole test suite; choose with ARGS='-k router'"
	@echo "make test-fast    the tests that need neither processes, nor meshes, nor a TPU's compiler: minutes"
	@echo "make nightly      the longer forms of tests: more kills, more pairs, every kind of bucket"
	@echo "make lint         format, lint and type checks"
	@echo "make format       rewrite the sources as 'make lint' wants them"

quickstart: export GLIBC_TUNABLES := $(MALLOC)
quickstart: .venv/installed-$(REQUIREMENTS)
	$(PYTHON) train.py ling_tiny --run quickstart
	$(PYTHON) sample.py --checkpoint runs/quickstart --prompt "class" --max-new-tokens 96
	@echo "The curves of this run: runs/quickstart/report.html"

test: export GLIBC_TUNABLES := $(MALLOC)
test: .venv/installed-requirements-test
	$(PYTEST) $(ARGS)

test-fast: export GLIBC_TUNABLES := $(MALLOC)
test-fast: .venv/installed-requirements-test
	$(PYTEST) -m "not slow and not nightly" $(ARGS)

nightly: export GLIBC_TUNABLES := $(MALLOC)
nightly: .venv/installed-requirements-test
	$(PYTEST) -m nightly $(ARGS)

lint: lint-format lint-rules lint-types lint-cpp

lint-format: .venv/installed-requirements-test
	$(PYTHON) -m ruff format --check .
	.venv/bin/clang-format --dry-run --Werror $(CPP)

lint-rules: .venv/installed-requirements-test
	$(PYTHON) -m ruff check .

lint-types: .venv/installed-requirements-test
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

# Warnings are errors here; users' builds are quiet (kernels/native.py). Headers of JAX are not ours to mend, nor are
# those of GCC 12, whose AVX-512 intrinsics warn once they are optimised: so syntax only.
lint-cpp: .venv/installed-requirements-test
	$(CXX) -std=c++17 -Wall -Wextra -Werror -march=native -fsyntax-only ling_jax/kernels/native.cc \
	  -isystem $$($(PYTHON) -c "import jax; print(jax.ffi.include_dir())")

format: .venv/installed-requirements-test
	$(PYTHON) -m ruff format .
	.venv/bin/clang-format -i $(CPP)
	$(PYTHON) -m ruff check --fix .

# The script makes the stamp, as its last act: what a failed install leaves behind is never taken for finished.
.venv/installed-requirements: requirements.txt
	scripts/make_venv.sh .venv requirements.txt

.venv/installed-requirements-cuda: requirements-cuda.txt requirements.txt
	scripts/make_venv.sh .venv requirements-cuda.txt

.venv/installed-requirements-test: requirements-test.txt requirements.txt
	scripts/make_venv.sh .venv requirements-test.txt
