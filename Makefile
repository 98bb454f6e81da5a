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
UNDER_SANITIZERS = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" PYTHONPATH=. \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1 $(abspath $(VENV))/bin/python
BUILD := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.*)
demo_extras := demo
lm_extras := example
paper_extras := paper
test_extras := demo,bench,paper,test,frameworks
bench_extras := bench
lint_extras := dev

.DELETE_ON_ERROR:
.PHONY: help demo lm test sanitize bench paper lint clean
.PRECIOUS: $(VENV)/torch.stamp $(VENV)/%.stamp

help:  ## This list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp  ## Train on digits with five optimizers; a table, demo/digits.png, demo/digits.json
	$(RUN) examples/digits.py $(ARGS)

lm: $(VENV)/lm.stamp  ## Train a small transformer on TEXT in two processes; checkpoints and curves in runs/lm
	$(RUN) -m torch.distributed.run --standalone --nproc_per_node 2 examples/train_lm.py $(TEXT) $(ARGS)

test: $(VENV)/test.stamp  ## Every test
	$(RUN) -m pytest $(ARGS)

sanitize: $(VENV)/test.stamp  ## C++ tests, a random walk and state tests under Address- and UndefinedBehaviorSanitizer
	@echo 'int main() {}' | $(CXX) -fsanitize=address,undefined -x c++ - -o /dev/null || \
	  { echo "make sanitize: $(CXX) has no libasan or no libubsan; install them, or name another compiler: CXX=..." >&2; exit 1; }
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
	cd $(SANITIZED)/package && $(UNDER_SANITIZERS) tests/walk.py --cases 2000
	cd $(SANITIZED)/package && $(UNDER_SANITIZERS) -m pytest tests/test_state.py tests/test_layouts.py tests/test_errors.py -k 'not triton'

bench: $(VENV)/bench.stamp  ## Steps, memory, kernels and scaling against peers: tables, pictures, results.json in bench/results
	$(RUN) -m bench $(ARGS)

paper: $(VENV)/paper.stamp  ## The paper's experiments on digits, or what ARGS say: tables, Figures 3 and 4 in runs/
	$(RUN) -m bench.paper $(or $(ARGS),digits --jobs 2)

lint: $(VENV)/lint.stamp  ## ruff, and mypy where pyproject.toml configures it
	$(RUN) -m ruff check .
	if grep -q '^\[tool.mypy' pyproject.toml; then $(RUN) -m mypy; fi

clean:  ## Remove what was made here
	rm -rf .venv build demo runs *.egg-info adabayes_fused/*.so .pytest_cache .hypothesis .ruff_cache .mypy_cache
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
