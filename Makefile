# The words to remember: demo, test, bench, lint. Each makes .venv first, if it is not there yet.
# MAX_JOBS limits the compiler; PYTHON picks the interpreter.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# The CPU build of torch comes first: a bare `torch` brings several GB of CUDA packages on Linux.
# On a GPU machine install the torch you want into .venv beforehand; it is kept.
TORCH ?= torch==2.13.0

.PHONY: demo test bench lint format native sanitize check-gpu-code gpu clean

demo: $(VENV)/.installed
	$(RUN) benchmarks/demo.py

# A process for each core, a file of tests to a process.
test: $(VENV)/.installed-dev
	$(RUN) -m pytest -n auto --dist loadfile

bench: $(VENV)/.installed-dev
	$(RUN) -m sdfast bench --dtype float32,bfloat16 --output 'benchmarks/results/{machine}' \
	    --against eager,eager-contiguous,sdfast-low,sdfast-optimize,compile,openvino,onnxruntime
	$(RUN) benchmarks/bench_zoo.py
	$(RUN) benchmarks/bench_training_memory.py
	$(RUN) benchmarks/bench_tiled_vae.py
	$(RUN) benchmarks/bench_build.py
	$(RUN) benchmarks/bench_digits_quality.py
	$(RUN) benchmarks/demo_inpaint.py
	$(RUN) benchmarks/bench_lora.py
	$(RUN) benchmarks/bench_train_ldm.py
	$(RUN) benchmarks/bench_vae_digits.py
	$(RUN) benchmarks/bench_segmentation.py accuracy
	$(RUN) benchmarks/bench_segmentation.py large
	$(RUN) benchmarks/report.py

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror csrc/* tests/*.cpp tests/*.h tests/simt/*.* tests/simt/planted/*

format: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i csrc/* tests/*.cpp tests/*.h tests/simt/*.* tests/simt/planted/*

# The operations' tests on libraries that report memory errors, in a copy of the package. Takes minutes.
sanitize: $(VENV)/.installed-dev
	mkdir -p build/sanitize
	tar --exclude='_C_*.so' --exclude=__pycache__ -c sdfast | tar -x -C build/sanitize
	$(VENV)/bin/cmake -S . -B build/cmake-sanitize -G Ninja -DSDFAST_SANITIZE=ON \
	    -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DPython3_EXECUTABLE=$(abspath $(RUN)) \
	    -DSDFAST_OUTPUT_DIR=$(abspath build/sanitize/sdfast)
	$(VENV)/bin/cmake --build build/cmake-sanitize
	$(RUN) tests/sanitize.py build/sanitize

# Compiles every Triton and CUDA C++ kernel for every GPU we support. Needs nvcc and no GPU; takes half an hour.
check-gpu-code: $(VENV)/.installed-dev
	PYTHONPATH=. $(RUN) tests/triton_code.py --all-plans
	PYTHONPATH=. $(RUN) tests/cuda_code.py

# On a GPU, in ten minutes: tests, operations and models beside eager and compiled torch, compute-sanitizer.
gpu: $(VENV)/.installed-dev
	$(RUN) tests/gpu_check.py

# Rebuilds the compiled libraries in place after a change under csrc/; SDFAST_CUDA_ARCHS=9.0a adds the CUDA library.
native: $(VENV)/.installed
	SDFAST_REQUIRE_NATIVE=1 $(RUN) setup.py build_ext --inplace

$(VENV)/.torch:
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -c "import torch" 2>/dev/null || $(VENV)/bin/pip install -q "$(TORCH)"
	$(VENV)/bin/pip install -q "setuptools>=77" wheel "cmake>=3.22" ninja
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/* csrc/*)
	@echo "# Compiles sdfast, which takes minutes."
	$(VENV)/bin/pip install -q --no-build-isolation -e .
	touch $@ $(VENV)/.torch

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/pip install -q --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info sdfast/_C_*
