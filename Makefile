# Sets up its own environment in .venv on first use, and anew when the build changes. A torch that $(PYTHON) already has,
# a GPU machine's say, is used as it is; else $(TORCH) is installed.
#   make test PYTHON=python3.12    make demo ARGS="--epochs 10"    make test PIP_FLAGS=--no-build-isolation  (no network)
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
ARGS ?=
TEXT ?= README.md

RUN := $(VENV)/bin/python
# The package is copied, so that the module in adabayes_fused/ stays as it is. Python itself is built without the sanitizers and
# loads ours late, so they go in front of everything; what Python and torch never free is not looked for.
SANITIZED := build/sanitize
SANITIZED_CASES ?= 2000
UNDER_SANITIZERS = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" PYTHONPATH=. \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1 $(abspath $(VENV))/bin/python
BUILD := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.*)
demo_extras := demo
lm_extras := example
paper_extras := paper
test_extras := demo,bench,paper,test,frameworks,docs
bench_extras := bench
lint_extras := dev
wheel_extras := wheel
matrix_extras := matrix

.DELETE_ON_ERROR:
.PHONY: help demo lm test fuzz mutate test-gpu-host run-gpu-host sanitizers-there sanitize bench paper docs hub wheel matrix lint clean
.PRECIOUS: $(VENV)/torch.stamp $(VENV)/%.stamp

help:  ## This list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp  ## Train on digits with five optimizers; a table, demo/digits.png, demo/digits.json
	$(RUN) examples/digits.py $(ARGS)

lm: $(VENV)/lm.stamp  ## Train a small transformer on TEXT in two processes; checkpoints and curves in runs/lm
	$(RUN) -m torch.distributed.run --standalone --nproc_per_node 2 examples/train_lm.py $(TEXT) $(ARGS)

test: $(VENV)/test.stamp  ## Every test
	$(RUN) -m pytest $(ARGS)

fuzz: $(VENV)/test.stamp  ## Random inputs on all backends and the slow path, for ten minutes: ARGS="--cases 50000 --seed 0 --minutes 60"
	$(RUN) tests/fuzz.py $(or $(ARGS),--cases 1000000 --minutes 10 --seed $$(date +%s))

mutate: $(VENV)/test.stamp  ## Small faults in the step's sources, one at a time, and which no test notices: ARGS="csrc/batch.cpp --count 20"
	$(RUN) tests/mutate.py $(ARGS)

# The extension is built apart, against the CUDA runtime that the stand-in takes the place of, so that the one in adabayes_fused/
# stays as it is. Left out: tensors of 2^31 elements, which no host has the memory for, and what the stand-in does not compute:
# Triton's kernels, and the compiler's.
GPU_HOST_VENV ?= .venv-gpu-host
GPU_TORCH ?= torch==2.14.1
GPU_HOST := build/gpu-host
GPU_PYTHON = $(abspath $(GPU_HOST_VENV))/bin/python
GPU_HOST_TESTS ?= tests/test_gpu.py tests/test_gpu_host.py tests/test_capture.py -k "not more_elements and not triton and not compiled"

test-gpu-host:  ## The GPU's tests on a CUDA runtime without a GPU (tests/fakecuda); needs nvcc and 7 GB for torch's CUDA build
	@if ! command -v nvcc >/dev/null; then echo "make test-gpu-host: skipped: nvcc was not found on the PATH"; \
	else $(MAKE) --no-print-directory run-gpu-host; fi

run-gpu-host: $(GPU_HOST_VENV)/gpu-host.stamp
	@$(GPU_PYTHON) -c 'import torch; assert torch.version.cuda' 2>/dev/null || { echo "$(GPU_HOST_VENV) has no CUDA build of torch" >&2; exit 1; }
	$(MAKE) -C tests/fakecuda VENV=$(abspath $(GPU_HOST_VENV)) all kernels
	rm -rf $(GPU_HOST)/package
	mkdir -p $(GPU_HOST)/package
	cp -r adabayes_fused tests bench pyproject.toml $(GPU_HOST)/package
	rm -rf $(GPU_HOST)/package/adabayes_fused/_native* $(GPU_HOST)/package/adabayes_fused/triton_kernels
	cp -r triton_kernels $(GPU_HOST)/package/adabayes_fused
	PATH="$(abspath $(GPU_HOST_VENV))/bin:$$PATH" CUDAARCHS=90-real cmake -S . -B $(GPU_HOST) -G Ninja -DADABAYES_CUDART=Shared \
	  -DADABAYES_TESTS=OFF -DADABAYES_OUTPUT=$(abspath $(GPU_HOST))/package/adabayes_fused -DPython_EXECUTABLE=$(GPU_PYTHON)
	$(abspath $(GPU_HOST_VENV))/bin/cmake --build $(GPU_HOST) --target _native
	cd $(GPU_HOST)/package && $(abspath tests/fakecuda/fakecuda) $(GPU_PYTHON) -m pytest -p pytest_fakecuda $(GPU_HOST_TESTS) $(ARGS)

$(GPU_HOST_VENV)/gpu-host.stamp:
	[ -x $(GPU_PYTHON) ] || $(PYTHON) -m venv $(GPU_HOST_VENV)
	$(GPU_PYTHON) -c 'import torch' 2>/dev/null || $(GPU_PYTHON) -m pip install $(PIP_FLAGS) "$(GPU_TORCH)"
	$(GPU_PYTHON) -m pip install $(PIP_FLAGS) cmake ninja numpy psutil pybind11 pytest rich
	touch $@

sanitizers-there:
	@echo 'int main() {}' | $(CXX) -fsanitize=address,undefined -x c++ - -o /dev/null || \
	  { echo "make sanitize: $(CXX) has no libasan or no libubsan; install them, or name another compiler: CXX=..." >&2; exit 1; }

sanitize: sanitizers-there $(VENV)/test.stamp  ## C++ tests, random walks, fuzzing and state tests under Address- and UndefinedBehaviorSanitizer
	CXX=$(CXX) $(RUN) -m cmake -S . -B $(SANITIZED) -G Ninja -DADABAYES_SANITIZE=ON -DADABAYES_CUDA=OFF \
	  -DPython_EXECUTABLE=$(abspath $(RUN))
	$(RUN) -m cmake --build $(SANITIZED)
	ASAN_OPTIONS=detect_leaks=0 $(VENV)/bin/ctest --test-dir $(SANITIZED) --output-on-failure
	rm -rf $(SANITIZED)/package
	mkdir $(SANITIZED)/package
	cp -r adabayes_fused tests pyproject.toml $(SANITIZED)/package
	cp -r triton_kernels $(SANITIZED)/package/adabayes_fused
	rm -f $(SANITIZED)/package/adabayes_fused/_native*
	cp $(SANITIZED)/_native* $(SANITIZED)/package/adabayes_fused
	cd $(SANITIZED)/package && $(UNDER_SANITIZERS) tests/walk.py --cases $(SANITIZED_CASES)
	cd $(SANITIZED)/package && $(UNDER_SANITIZERS) tests/fuzz.py --cases $(SANITIZED_CASES)
	cd $(SANITIZED)/package && $(UNDER_SANITIZERS) -m pytest tests/test_state.py tests/test_layouts.py tests/test_errors.py -k 'not triton'

bench: $(VENV)/bench.stamp  ## Steps, memory, kernels and scaling against peers: tables, pictures, results.json in bench/results
	$(RUN) -m bench $(ARGS)

paper: $(VENV)/paper.stamp  ## The paper's experiments on digits, or what ARGS say: tables, Figures 3 and 4 in runs/
	$(RUN) -m bench.paper $(or $(ARGS),digits --jobs 2)

matrix: $(VENV)/matrix.stamp  ## Tests beside torch 2.11 to 2.15 and under Python 3.10 to 3.14, as far as they can be had; tens of GB
	rm -rf build/matrix
	mkdir -p build/matrix
	$(VENV)/bin/nox --report build/matrix/report.json $(ARGS)

# torch brings an OpenMP runtime, libgomp.so.1, and is imported first: a second one beside it would have two sets of threads that
# wait for each other.
wheel: $(VENV)/wheel.stamp  ## A manylinux wheel of $(PYTHON) in dist/, with the CUDA kernels where nvcc is
	rm -rf build/wheel
	ADABAYES_FUSED_NATIVE=1 $(RUN) -m build --wheel --outdir build/wheel
	PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) -m auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl

hub:  ## The Triton kernels as a repository for Hugging Face's kernels, in build/hub
	rm -rf build/hub
	mkdir -p build/hub/build/torch-universal
	cp hub/README.md build/hub
	cp hub/metadata.json triton_kernels/*.py build/hub/build/torch-universal

# It reads the sources, and needs no torch.
DOCS := build/docs-venv
docs: $(DOCS)/stamp  ## The documentation as a site in build/site, strictly: a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

$(DOCS)/stamp: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	sed -nE 's/^docs = \[(.*)\]$$/\1/p' pyproject.toml | tr -d , | xargs $(DOCS)/bin/python -m pip install $(PIP_FLAGS)
	touch $@

lint: $(VENV)/lint.stamp  ## ruff, mypy where pyproject.toml configures it, zizmor over the workflows
	$(RUN) -m ruff check .
	if grep -q '^\[tool.mypy' pyproject.toml; then $(RUN) -m mypy; fi
	$(VENV)/bin/zizmor --offline --quiet .github

clean:  ## Remove what was made here
	rm -rf .venv .venv-gpu-host build dist tests/fakecuda/build demo runs *.egg-info adabayes_fused/*.so .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Without pip of its own, the environment uses $(PYTHON)'s: an old setuptools, which venv may bring, would hide $(PYTHON)'s.
# If $(PYTHON) is an environment itself, its torch stays out of reach; then $(TORCH) is installed.
$(VENV)/torch.stamp:
	if $(PYTHON) -c 'import pip, torch' 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages --without-pip $(VENV); \
	else $(PYTHON) -m venv $(VENV); fi
	$(RUN) -c 'import torch' 2>/dev/null || { $(RUN) -m pip --version 2>/dev/null || $(RUN) -m ensurepip; $(RUN) -m pip install $(PIP_FLAGS) "$(TORCH)"; }
	touch $@

# Editable: run from here, Python sees the folder adabayes_fused before any installed copy, so the compiled module belongs in it.
$(VENV)/%.stamp: $(VENV)/torch.stamp $(BUILD)
	$(RUN) -m pip install $(PIP_FLAGS) -e ".[$($*_extras)]"
	touch $@
