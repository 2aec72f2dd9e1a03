# `make test` and `make bench` need only python >= 3.10 with pip and a C++20 compiler: each creates .venv, installs
# torch and the rest, builds the extension, and then does its job. A second run starts at once.
#
#   make test TORCH=2.14.1      another torch
#   make test FASTFORMER_CUDA=0 without the CUDA half

TORCH ?= 2.13.0
PYTHON ?= python3
VENV ?= .venv

PY := $(VENV)/bin/python
CXX_SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

# Without a CUDA toolkit nvcc comes from pip. All five from one release: mixed ones resolve, and do not compile.
CUDA_RELEASE := 13.0.*
NVCC := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
ifeq ($(NVCC)$(filter 0,$(FASTFORMER_CUDA)),)
CUDA_PACKAGES := $(foreach package,nvcc crt runtime cccl,'nvidia-cuda-$(package)==$(CUDA_RELEASE)') \
                 'nvidia-nvvm==$(CUDA_RELEASE)'
endif

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests and benchmarks use models that lie on the disk; nothing may wait for a network.
offline := HF_HUB_OFFLINE=1

.PHONY: test bench gates build setup lint format wheel sanitize sanitize-address sanitize-thread clean

test: build
	$(offline) $(PY) -m pytest $(ARGS)

bench: build
	$(offline) $(PY) -m benchmarks $(ARGS)

# Registers, spills and instruction mix of every kernel configuration, compiled for every GPU; about an hour at first.
gates: setup
	$(PY) -m tests.gates $(ARGS)

# ninja decides what is stale; this only asks it.
build: setup
	@$(PY) setup.py --quiet build_ext --inplace

setup: $(VENV)/.installed

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastformer needs python >= 3.10")'
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(PY) install pip; }
	touch $@

# Named after the version, so that another TORCH is installed over the old one.
$(VENV)/.torch-$(TORCH): $(VENV)/.created
	rm -f $(VENV)/.torch-*
	$(PY) -m pip install torch==$(TORCH) 'setuptools>=77' ninja 'pybind11>=2.13' $(CUDA_PACKAGES)
	touch $@

# Built before pip asks for it: pip would hide minutes of progress.
$(VENV)/.installed: $(VENV)/.torch-$(TORCH) pyproject.toml setup.py
	$(PY) setup.py --quiet build_ext --inplace
	$(PY) -m pip install --no-build-isolation torch==$(TORCH) --editable '.[bench,lint,test]'
	touch $@

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

format: setup
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

# A wheel in dist/, tried out in a clean environment.
wheel: setup
	rm -rf dist build/lib* build/bdist*
	$(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .
	$(PY) tests/packaging/check_wheel.py dist/*.whl --torch $(TORCH)

# The CPU's kernels under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer. Needs g++.
sanitize: sanitize-address sanitize-thread

sanitize-address sanitize-thread: sanitize-%: setup
	$(offline) $(PY) tests/sanitize/run.py $* $(ARGS)

clean:
	rm -rf build dist *.egg-info fastformer/*.so
