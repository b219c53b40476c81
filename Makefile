# make demo | train-demo | test | emulators | test-cpus | test-full | acceptance | architecture | chart | fuzz | soak | test-compat | compiled-kernels | mutations | simt | simt-full | lint | bench | aot | cuda | ptxas
#      | gpu-account | gpu-bring | gpu-contact | gpu-report | gpu-peers | venv | venv-standalone | clean
#
# Everything happens in .venv, made on first use with the best Python found (or PYTHON=...): `make demo` installs what the
# demo needs, everything else (`make venv`) adds what tests and lint need. The download's size is said before it begins.
# ARGS is passed on:
#   make demo ARGS="--precision bf16"     make test ARGS="-k patch"

VENV    := .venv
ALONE   := .venv-standalone
COMPAT  := 0.5.1 0.4.4
DEMO    := $(VENV)/.demo
TESTS   := $(VENV)/.tests
SOURCES := pyproject.toml setup.py $(shell find csrc -type f -not -path '*/__pycache__/*')
PIP     := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-input
# A bare GPU machine may have torch, Triton and nvcc but no network: there the system's Python is used as it is.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)
ARGS    ?=
# Processes of `make test`; 0: one process, with live output.
JOBS    ?= 2

.PHONY: demo train-demo test emulators test-cpus test-full acceptance architecture chart fuzz soak test-compat compiled-kernels mutations simt simt-full lint bench aot cuda ptxas gpu-account gpu-bring gpu-contact gpu-report gpu-peers venv venv-standalone clean
.DELETE_ON_ERROR:

# Bytecode is made of what is imported, not of all that is installed: most of it nobody imports here. Where Python is told to
# keep none, as in many containers, every process would compile torch and LeRobot anew, for half a minute.
export PIP_COMPILE := 0
export PYTHONDONTWRITEBYTECODE :=
# Sources and pages are UTF-8 whatever the locale.
export PYTHONUTF8 := 1

demo: $(DEMO)
	$(VENV)/bin/smolvla-fast demo $(ARGS)

# A dataset written, a run killed and resumed, an evaluation, the trained policy patched; ARGS=FOLDER (outputs/train-demo)
train-demo: venv
	HF_HUB_OFFLINE=1 $(VENV)/bin/python examples/train_demo.py $(ARGS)

test: venv
	HF_HUB_OFFLINE=1 SMOLVLA_FAST_PYTHONS=$(wildcard $(ALONE)/bin/python) $(VENV)/bin/python -m pytest -n $(JOBS) \
	    --no-loadscope-reorder --max-worker-restart=0 $(ARGS)

# What the tests compile when they first ask: the emulators of GPUs and of processors' instructions. Needs no torch.
emulators:
	PYTHONPATH=tests:csrc $(VENV)/bin/python -m support.build_emulators

# What depends on the processor, once as each lesser one that this one can play; tests/support/processors.py says how.
test-cpus: venv
	HF_HUB_OFFLINE=1 PYTHONPATH=tests:csrc $(VENV)/bin/python -m support.processors -n $(JOBS) $(ARGS)

# With the tests marked `long`: the 450M policy's peak memory, fp8 and int8, every barrier left out in turn, and the like.
test-full: venv
	SMOLVLA_FAST_LONG=1 $(MAKE) test

# Two thousand drawn cases instead of the sixty of `make test`; other ones every time.
fuzz: venv
	HF_HUB_OFFLINE=1 SMOLVLA_FAST_FUZZ=$(or $(CASES),2000) $(VENV)/bin/python -m pytest tests/fuzz -s $(ARGS)

# Ten minutes at most: ten thousand chunks, then drawn cases; counts, memory first and last.
soak: venv
	HF_HUB_OFFLINE=1 PYTHONPATH=tests $(VENV)/bin/python -m fuzz.soak $(ARGS)

# Parity and patch tests under other releases of LeRobot, each in an environment of its own: minutes to make
# the first time, and several GB. ARGS is passed to pytest.
test-compat: $(COMPAT:%=.venv-lerobot-%/.ready)
	@for version in $(COMPAT); do \
	    echo "LeRobot $$version"; \
	    HF_HUB_OFFLINE=1 .venv-lerobot-$$version/bin/python -m pytest -q -p no:cacheprovider -m "not slow" \
	        tests/inference/test_inference.py tests/patching/test_patch.py tests/acceptance/test_real_time_chunking.py tests/patching/test_eligibility.py \
	        tests/layers \
	        $(ARGS) || exit 1; \
	done

# 0.5 needs Python 3.12, 0.4.4 is the last release for 3.10 and 3.11. The extension, made for the Python of $(VENV), is not
# there under another Python: torch serves the ops.
.venv-lerobot-%/.ready:
	@python=$$(scripts/find_python.sh $(if $(filter 0.4.%,$*),10 11,12 13)) || exit 1; \
	echo "Creating .venv-lerobot-$* with $$python: LeRobot $* and pytest."; \
	"$$python" -m venv --clear .venv-lerobot-$*
	@.venv-lerobot-$*/bin/python -m pip install -qq --disable-pip-version-check --upgrade pip
	@.venv-lerobot-$*/bin/python -m pip install -qq --disable-pip-version-check "lerobot[smolvla]==$*" peft pytest \
	    pytest-benchmark hypothesis
	@touch $@

# docs/chart.png anew, of the README's figures.
chart: venv
	$(VENV)/bin/python -m benchmarks.report.chart

# docs/architecture.md (its map, from the imports) and docs/acceptance.md (from the marks of the tests) anew.
architecture: venv
	$(VENV)/bin/python tests/support/structure.py

acceptance: venv
	$(VENV)/bin/python tests/support/checks.py

# Triton's kernels as they are compiled for a GPU, run on the CPU: benchmarks/results/compiled-kernels.md anew.
compiled-kernels: venv
	HF_HUB_OFFLINE=1 PYTHONPATH=.:tests $(VENV)/bin/python -m simt.ptx.report

# Changes of the kernels in a copy, and whose tests notice: minutes. ARGS="NAME" for some of them.
mutations: venv
	HF_HUB_OFFLINE=1 PYTHONPATH=.:tests $(VENV)/bin/python -m simt.ptx.mutations $(ARGS)

# CUDA C++ kernels run on the host, by the emulator of tests/simt/emulator: without the slow ones; and with them, and
# what else runs Triton's kernels, compiled for sm_80; each op in five orders instead of two.
simt: venv
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest tests/simt tests/ops -m "simt and not slow" $(ARGS)

simt-full: venv
	HF_HUB_OFFLINE=1 SMOLVLA_FAST_LONG=1 $(VENV)/bin/python -m pytest tests/simt tests/ops -m simt $(ARGS)
	HF_HUB_OFFLINE=1 SMOLVLA_FAST_LONG=1 SMOLVLA_FAST_TRITON=sm_80 $(VENV)/bin/python -m pytest -m "triton or compiled_kernels" $(ARGS)

# A Python 3.10 or 3.11 with torch and transformers and no LeRobot: where our own SmolVLA has to stand alone.
venv-standalone: $(ALONE)/.ready

$(ALONE)/.ready:
	@python=$$(scripts/find_python.sh 11 10) || exit 1; \
	echo "Creating $(ALONE) with $$python: torch and transformers, no LeRobot."; \
	"$$python" -m venv --clear $(ALONE)
	@$(ALONE)/bin/python -m pip install -qq --disable-pip-version-check --upgrade pip
	@$(ALONE)/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0 transformers safetensors numpy platformdirs pillow
	@touch $@

lint: venv
	$(VENV)/bin/ruff check --no-cache
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench: venv
	$(VENV)/bin/smolvla-fast bench $(ARGS)

# docs/gpu.md. What a machine with a GPU and no network is brought, built here; ARGS="--part kernels" for one thing alone.
gpu-bring: venv
	@$(VENV)/bin/python -m benchmarks.gpu_run bring $(ARGS)

# Seven minutes with a GPU for the first time; ARGS="--out DIR", "--part policy", "--rehearse" (no GPU), "--commit NAME"
gpu-contact:
	@$(GPU_PYTHON) -m benchmarks.gpu_run contact $(ARGS)

# ARGS="--part chunk", "--only linear", "--out DIR", "--rehearse" (no GPU), "--commit NAME" (a tree without its history)
gpu-report:
	@$(GPU_PYTHON) -m benchmarks.gpu_run report $(ARGS)

gpu-peers:
	@$(GPU_PYTHON) -m benchmarks.gpu_run peers $(ARGS)

aot: venv
	$(VENV)/bin/python -m benchmarks.compiled aot $(ARGS)

# Where the time of a chunk should go on an H100, from what the code launches: docs/gpu-account.md anew. Needs no GPU.
gpu-account: venv
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m benchmarks.gpu_account $(ARGS)

# The CUDA part alone, into the checkout, recompiling what has changed: for the GPUs that are here, for all architectures
# without one, for one with SMOLVLA_CUDA_ARCHS=90a. Needs nvcc and no GPU.
cuda:
	@python="$(GPU_PYTHON)"; \
	$$python -c 'import pybind11, setuptools' 2>/dev/null || { $(MAKE) venv && python=$(VENV)/bin/python; } || exit 1; \
	$$python setup.py -q build_ext --inplace --only cuda && \
	$$python -c 'import smolvla_fast._cuda as cuda; print("It loads here; GPUs found:", cuda.device_count())'

# Registers, spills and instructions of every CUDA C++ kernel: benchmarks/results/ptxas.md.
ptxas: venv
	$(VENV)/bin/python -m benchmarks.compiled ptxas $(ARGS)

venv: $(TESTS)

# The pip of an older Python is replaced first: its resolver goes through LeRobot's dependencies for many minutes.
define install
	@if ! $(VENV)/bin/python -c '' 2>/dev/null; then \
	    python=$${PYTHON:-$$(scripts/find_python.sh)} && [ -n "$$python" ] || exit 1; \
	    "$$python" -c '' || { echo "$$python does not run; name another: make venv PYTHON=..."; exit 1; }; \
	    echo "Creating $(VENV) with $$python ($$("$$python" -V))."; \
	    "$$python" -m venv --clear $(VENV) || exit 1; \
	fi
	@$(PIP) "pip>=25" "setuptools>=77" wheel "pybind11>=2.13" ninja
	@$(VENV)/bin/python scripts/install.py $(1)
	@$(VENV)/bin/python -c "from smolvla_fast.ops.extension import KINDS, why_missing as why; \
	    print(*(why(kind) or f'smolvla_fast._{kind} is ready' for kind in KINDS), sep='\n')"
endef

$(DEMO): $(SOURCES)
	$(call install,lerobot cli)
	@touch $@

$(TESTS): $(SOURCES)
	$(call install,lerobot dev)
	@touch $(DEMO) $@

# Never both at once: where more than the demo is made, it finds itself installed.
ifneq ($(filter-out demo clean,$(MAKECMDGOALS)),)
$(DEMO): | $(TESTS)
endif

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis demo.json demo.png verify.json verify.md verify.html verify-*.png
	rm -f $(DEMO) $(TESTS) smolvla_fast/*.so smolvla_fast/_build.json
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
