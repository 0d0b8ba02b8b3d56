# Every verb works on a fresh machine: it makes .venv unless an environment is active.
PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
PY := $(VENV)/bin/python
# One mark for each checkout that was installed into the environment.
INSTALLED := $(VENV)/.installed$(subst /,-,$(CURDIR))
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

# One thread in each process: most tests are too small for more. One process more than cores, since
# some tests wait for others.
PROCESSES := $(shell expr $$(nproc) + 1)
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -rs -n $(PROCESSES) --dist worksteal

.PHONY: install demo check test mutants fuzz torture soak bench gpu-check gpu-reports lint types docs wheel sanitize

install: $(INSTALLED)

$(PY):
	$(PYTHON) -m venv $(VENV)

# torch comes first: the extension is built against the torch that is installed.
$(INSTALLED): $(SOURCES) | $(PY)
	$(PY) -c "import torch, torchvision" 2>/dev/null || $(PY) -m pip install torch torchvision
	$(PY) -m pip install -e ".[dev]"
	touch $@

demo: install
	$(PY) examples/demo.py

# For the edit loop: everything but the tests that take long.
check: lint types
	$(PYTEST) -m "not slow"

test: install
	$(PYTEST)

# All that takes long of the GPU kernels on the CPU, of which `make test` runs a part: damaged
# kernels, which the checks must notice, every size of a vision transformer, every architecture.
mutants: install
	MUTANTS=all $(PYTEST) tests/gpu

# Random inputs at every boundary, as many as FUZZ_EXAMPLES for each test times its share: about
# 10^5 in all. FUZZ_SEED=N draws others. `make test` runs a slice of a minute.
FUZZ_EXAMPLES ?= 4000
FUZZ_SEED ?= 0
fuzz: install
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) FUZZ_SEED=$(FUZZ_SEED) $(PYTEST) tests/fuzz

# Training that is killed, finds full disks and loses power, as often as TORTURE_KILLS for each
# test. `make test` runs a slice of it.
TORTURE_KILLS ?= 100
TORTURE_SEED ?= 0
torture: install
	TORTURE_KILLS=$(TORTURE_KILLS) TORTURE_SEED=$(TORTURE_SEED) $(PYTEST) tests/torture

# Hours of everything in one process on several threads; the chart is in build/soak.
SOAK_MINUTES ?= 120
soak: install
	$(PY) bench/soak.py --minutes $(SOAK_MINUTES)

bench: install
	$(PY) -m pytest bench -rs --benchmark-only --benchmark-columns=median,iqr,rounds \
	  --benchmark-group-by=func,param:name,param:shape,param:dtype,param:direction

# Correctness and timings of the Triton and CUDA kernels, where there is a GPU.
gpu-check: install
	PYTHONPATH=bench $(PY) bench/gpu/check.py

# What compilers and emulator say of the GPU kernels, without a GPU: bench/gpu/*.md, kernels/known.json.
gpu-reports: install
	PYTHONPATH=tests/gpu $(PY) tools/gpu_resources.py
	PYTHONPATH=tests/gpu $(PY) tools/gpu_traffic.py
	PYTHONPATH=tests/gpu:tools $(PY) tools/gpu_choice.py
	PYTHONPATH=tests:tests/gpu:tests/gpu/cuda $(PY) tools/cuda_report.py

lint: install
	$(PY) -m ruff check .

types: install
	$(PY) -m pyright --pythonpath $(PY)

# The site, in build/site. The build fails on every warning.
docs: install
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# A wheel with the CPU kernels, in dist/, tried in an environment that sees no compiler.
wheel: install
	$(PY) -m pip install -q auditwheel "setuptools>=77" wheel
	ADACOMCAT_NO_CUDA=1 $(PY) -m pip wheel --no-deps --no-build-isolation -w dist .
	$(PY) tools/try_wheel.py dist/adacomcat-*.whl

# The C++ kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer. The build for it
# stands apart in build/sanitize; libasan comes first, since python itself is built without.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: install
	$(PY) -m pip install -q "setuptools>=77" wheel
	CFLAGS="$(SANITIZERS) -fno-omit-frame-pointer -g1" LDFLAGS="$(SANITIZERS)" \
	  $(PY) -m pip install -q --upgrade --no-deps --no-build-isolation --target build/sanitize .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize \
	  $(PY) -P -m pytest -q -p no:cacheprovider tests/ops \
	    tests/factorize/test_identity_gauge.py --ignore tests/ops/test_ops.py \
	    --ignore tests/ops/test_backends.py \
	    -k "not environment"
