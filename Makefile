# make            what there is
# make demo       needs python3, g++ and make; everything else goes into .venv
PYTHON ?= python3
# Installed only where .venv has no torch yet: TORCH="torch" takes the newest.
TORCH ?= torch==2.13.0
# For `make gpu` and `make wheel`: an environment with a torch for GPUs, which .venv does not have.
GPU_PYTHON ?= python3
# auto, on, off: see setup.py
GPT4FAST_BUILD ?= auto
GPT4FAST_CUDA ?= auto
export GPT4FAST_BUILD GPT4FAST_CUDA

BIN := .venv/bin
# One stamp for each setting, so that a change of setting installs again and a second call does nothing.
STAMP := .venv/.installed-$(GPT4FAST_BUILD)-$(GPT4FAST_CUDA)
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help install demo test bench lint format gpu wheel sanitize clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(STAMP): $(BIN)/python $(SOURCES)
	@$(BIN)/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)" \
	  || $(BIN)/pip install '$(TORCH)'
	$(BIN)/pip install -e '.[test,demo,bench]'
	@$(BIN)/python -c "from gpt4fast.backends import native; print('native CPU library:', native.cpu_library_error() or 'built')"
	@rm -f .venv/.installed-*
	@touch $@

install: $(STAMP)  ## create .venv and install gpt4fast into it, editable

demo: install  ## the six steps on small real data, about 6 minutes; ends with demo-output/report.html
	$(BIN)/gpt4fast demo --output demo-output

test: install  ## the test battery, under 15 minutes on 2 cores
	$(BIN)/python -m pytest -q -m "not gpu" -n 2

bench: install  ## measure both operators against torch: tables, charts and JSON in bench-output
	$(BIN)/gpt4fast bench attention --output bench-output/attention
	$(BIN)/gpt4fast bench conv_transpose --output bench-output/conv_transpose

lint: $(BIN)/ruff  ## ruff and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format: $(BIN)/ruff  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

$(BIN)/ruff: $(BIN)/python
	$(BIN)/pip install -q ruff clang-format
	@touch $@

gpu:  ## everything that needs an NVIDIA GPU, in $(GPU_PYTHON) with the torch it has and no network: tests, speed
	@nvidia-smi -L >/dev/null 2>&1 || { echo "make gpu: nvidia-smi finds no NVIDIA GPU here; nothing was run"; exit 1; }
	@$(GPU_PYTHON) -c "import torch; torch.cuda.is_available() or exit('make gpu: torch ' + torch.__version__ + ' sees no GPU; nothing was run')"
	GPT4FAST_BUILD=on GPT4FAST_CUDA=on $(GPU_PYTHON) -m pip install -q --no-index --no-deps --no-build-isolation \
	  --upgrade --target build/gpu $(if $(CARRY),dist/*.whl,.)
	PYTHONPATH=build/gpu $(GPU_PYTHON) tools/gpu.py --output bench-output/gpu

wheel:  ## a wheel in dist, with CUDA kernels where nvcc is: `make gpu CARRY=1` installs it elsewhere without compiling
	$(GPU_PYTHON) -m pip wheel -q --no-deps --wheel-dir dist .

sanitize: install  ## the operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	GPT4FAST_BUILD=on GPT4FAST_CUDA=off GPT4FAST_SANITIZE=on \
	  $(BIN)/pip install -q --no-deps --upgrade --target build/sanitize .
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize \
	  $(BIN)/pytest -q -p no:cacheprovider tests/csrc --ignore tests/csrc/cuda_emulation \
	  --ignore tests/csrc/test_symbols.py  # fibers have stacks of their own; symbols are of the real libraries

clean:  ## remove everything that was built or generated, but not .venv
	rm -rf build dist *.egg-info demo-output bench-output .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f gpt4fast/*.so gpt4fast/pure_python.txt .venv/.installed-*
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
