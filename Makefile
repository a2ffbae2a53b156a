# `make help` lists the targets. Needs Python 3.10 or later (with venv and headers) and a C++17 compiler; everything
# else is installed into .venv.
PYTHON ?= python3
ARGS ?=

# Succeeds where a torch of the range in pyproject.toml is installed.
has_torch := import importlib.metadata as m; v = m.version('torch').split('.'); assert (2, 4) <= (int(v[0]), int(v[1])) < (3, 0)

# A virtual environment that has torch and is active (or is PYTHON's) is used as it is. Everyone else gets .venv.
venv := $(shell $(PYTHON) -c "$(has_torch); import sys; print(sys.prefix if sys.prefix != sys.base_prefix else '.venv')" 2>/dev/null || echo .venv)

# What each installation depends on, beside its environment.
sources := pyproject.toml setup.py build_backend.py CMakeLists.txt constraints.txt $(wildcard cmake/*) $(shell find csrc -type f)
native_code = $(shell find csrc tests/cpp -name '*.[ch]pp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Stamps of installations, from small to large. A large one serves the smaller targets as well.
bench_stamp := $(venv)/.deep-a2a-bench
test_stamp := $(venv)/.deep-a2a-test
dev_stamp := $(venv)/.deep-a2a-dev
cmake_stamp := $(venv)/.deep-a2a-cmake
for_test := $(or $(wildcard $(dev_stamp)),$(test_stamp))
for_bench := $(or $(wildcard $(dev_stamp)),$(wildcard $(test_stamp)),$(bench_stamp))

# Recipes find the environment's programs first.
export PATH := $(abspath $(venv))/bin:$(PATH)

.PHONY: help demo bench test check format tsan asan emulator mutants clean
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z ]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(for_bench) ## train the small MoE model on 8 ranks (ARGS="..." for its options)
	deep-a2a demo $(ARGS)

bench: $(for_bench) ## measure this machine (ARGS="..." for its options)
	deep-a2a bench $(ARGS)

test: $(for_test) ## run all tests (ARGS="..." for pytest)
	python -m pytest $(ARGS)

check: $(dev_stamp) ## ruff, mypy and clang-format
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(native_code)

format: $(dev_stamp) ## format Python and C++
	ruff check --fix-only .
	ruff format .
	clang-format -i $(native_code)

tsan: ## run the C++ driver under ThreadSanitizer
asan: ## run the C++ driver under AddressSanitizer and UndefinedBehaviorSanitizer
tsan: sanitizer := thread
asan: sanitizer := address
tsan: export TSAN_OPTIONS ?= halt_on_error=1
# Older ThreadSanitizer runtimes cannot place their memory where the kernel randomises much.
tsan: launcher := $(shell setarch -R true 2>/dev/null && echo setarch -R)
tsan asan: $(cmake_stamp)
	cmake -S . -B build/$@ -G Ninja -DDEEP_A2A_PYTHON=OFF -DDEEP_A2A_TESTS=ON -DDEEP_A2A_CUDA=OFF -DDEEP_A2A_SANITIZE=$(sanitizer)
	cmake --build build/$@ --target protocol_driver
	$(launcher) build/$@/protocol_driver $(ARGS)

emulator: $(cmake_stamp) ## test the emulator that runs the CUDA kernels without a GPU
	cmake -S . -B build/$@ -G Ninja -DDEEP_A2A_PYTHON=OFF -DDEEP_A2A_TESTS=ON -DDEEP_A2A_CUDA=OFF
	cmake --build build/$@ --target emulator_test
	build/$@/emulator_test

mutants: $(cmake_stamp) ## show that the C++ driver notices each ordering that is taken out of the protocol
	python tests/cpp/mutate.py

clean: ## remove everything that was built, except .venv
	rm -rf build dist train_moe.png *.egg-info deep_a2a/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis $(venv)/.deep-a2a-*
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# An interpreter outside of virtual environments lends its torch to .venv, if it has one.
$(venv)/pyvenv.cfg:
	@! $(PYTHON) -c "$(has_torch)" 2>/dev/null || lend_torch=--system-site-packages; \
	  $(PYTHON) -m venv $$lend_torch $(venv) || { rm -rf $(venv); exit 1; }

# Some tools make environments without pip.
$(venv)/bin/pip: | $(venv)/pyvenv.cfg
	@python -m pip --version >/dev/null 2>&1 || python -m ensurepip --default-pip

$(bench_stamp): extras := bench
$(test_stamp): extras := bench,test
$(dev_stamp): extras := dev
$(bench_stamp) $(test_stamp) $(dev_stamp): $(venv)/pyvenv.cfg $(sources) | $(venv)/bin/pip
	@python -c "$(has_torch)" 2>/dev/null || pin_torch="--constraint constraints.txt"; \
	  python -m pip install $$pin_torch --editable '.[$(extras)]'
	@cat "$$(ls -t build/native-*/backends.txt | head -n 1)"
	@touch $@

$(cmake_stamp): $(venv)/pyvenv.cfg | $(venv)/bin/pip
	python -m pip install cmake ninja
	@touch $@
