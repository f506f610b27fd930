# Everything runs in .venv, which `make install` makes. Set PYTHON to choose the interpreter, and TORCH_INDEX_URL to
# choose where torch comes from: https://download.pytorch.org/whl/cpu saves gigabytes on a machine without a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.cpp csrc/*/*)
# Two threads each on a busy machine make several processes many times slower.
export OMP_NUM_THREADS ?= 1
# A file's tests stay together: they share what is set up once.
TWO_AT_ONCE := -n 2 --dist loadfile

.PHONY: help install demo test test-fast emulated-test parity lint format gpu-build gpu-test gpu-bench clean

help:
	@echo "make install    .venv with pinned dependencies and the built extensions"
	@echo "make demo       from this machine's own text to a trained model, in three dimensions of parallelism"
	@echo "make test       all tests (13 to 17 minutes on two cores); make test-fast: the quick ones"
	@echo "make parity     every layout against one process in float64, as a table"
	@echo "make lint       formatting, lint, types; make format: repair what can be repaired"
	@echo "make emulated-test  the CUDA kernels' tests, on the CPU; needs a CUDA toolkit's headers, no GPU"
	@echo "make gpu-test   tests on a GPU; make gpu-bench: measurements on a GPU. Both need torch, not .venv"
	@echo "make clean      remove .venv, builds and the demo's folder"

install: $(STAMP)

# torch comes first and by itself: the extensions are compiled against it, and no other requirement may replace it.
$(STAMP): setup.py pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja "pybind11>=3.0" numpy
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[test,lint,plot,data]"
	$(BIN)/python -m megallm.info
	@touch $(STAMP)

demo: install
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh

test: install
	$(BIN)/python -m pytest -q $(TWO_AT_ONCE)

test-fast: install
	$(BIN)/python -m pytest -q -m "not slow" $(TWO_AT_ONCE)

# The kernels compiled for the CPU, in a copy of the project. A kernel that does what it must not ends the process: what
# it says then is only seen if pytest does not keep it.
EMULATED := build/emulated
emulated-test: install
	$(BIN)/python -m tests.emulated.build $(EMULATED)
	cd $(EMULATED) && PYTHONPATH=. $(abspath $(BIN))/python -m pytest -q --capture=sys -p no:cacheprovider \
		tests/emulated/operators.py tests/unit/ops \
		--ignore tests/unit/ops/test_ops_rule.py --ignore tests/unit/ops/test_ops_library.py

parity: install
	$(BIN)/python -m tests.distributed.parity

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h')

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h')

# A machine with a GPU may have no network: these build in place with the Python that is there, and with all cores, since
# its time is dear. What does not compile is an error: without it there would be nothing to test.
gpu-build:
	MEGALLM_NATIVE=1 MAX_JOBS=$${MAX_JOBS:-$$(nproc)} $(PYTHON) setup.py -q build_ext --inplace

# Within nine minutes, the build of one among them.
gpu-test: gpu-build
	$(PYTHON) -m pytest -q tests/gpu --seconds 420 --results benchmarks/results/tests_gpu.json

# Meant for nine minutes on an H200, which nobody has run so far. What fails does not keep the rest from running. The
# package is not installed there: it is found in the checkout.
gpu-bench: export PYTHONPATH := .
gpu-bench: gpu-build
	@failed=0; \
	timeout 90 $(PYTHON) benchmarks/layer.py --device cuda --output benchmarks/results/layer_gpu.json || failed=1; \
	PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True timeout 200 $(PYTHON) benchmarks/train_7b.py --device cuda \
		--output benchmarks/results/train_7b_gpu.json || failed=1; \
	timeout 90 $(PYTHON) benchmarks/ops.py --device cuda --seconds 60 --output benchmarks/results/ops_gpu.json \
		|| failed=1; \
	timeout 90 $(PYTHON) benchmarks/ops.py --device cuda --seconds 60 --compile --only rms_norm swiglu cross_entropy \
		--output benchmarks/results/ops_compiled_gpu.json || failed=1; \
	exit $$failed

clean:
	rm -rf $(VENV) build demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megallm -name '*.so' -delete
