# `make demo` and `make test` do all set-up themselves, from a bare checkout.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
BUILT_FROM := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/cpu/* kernels/cuda/*)

.PHONY: demo test lint bench wheel wheel-check gpu-check clean

$(VENV)/ready: $(BUILT_FROM)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy "setuptools>=77" wheel pybind11 cmake ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e ".[train,triton,test,test-peers,bench]" ruff mypy clang-format
	touch $@

# Without their dependencies, which are heavy: the tests stub those. OpenRLHF has a wheel for one Python only. Two older
# TRLs, each in a folder of its own, which constraints.txt cannot name beside the newest: one test finds it there. The last
# that computes DPO's loss from logits, and the last with a PPO trainer.
$(VENV)/peers: $(VENV)/ready
	$(PIP) --no-deps verl "openrlhf; python_version == '3.11' and platform_machine == 'x86_64'"
# Nothing of it is compiled when it is installed. Where CUDA is there without its compiler it cannot be: its tests skip.
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed || echo "no DeepSpeed: the tests of ZeRO are skipped"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(VENV)/older trl==1.14.2
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(VENV)/trl-ppo trl==1.12.0
	touch $@

demo: $(VENV)/ready
	$(BIN)/rlhf-fast demo

# A process per core, up to eight of a gigabyte each, and a file at a time: what a module prepares for its tests, or starts,
# is there once. Plain `pytest` runs the same tests in one process.
test: $(VENV)/peers
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.hpp' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

bench: $(VENV)/ready
	$(BIN)/rlhf-fast bench --out benchmarks/results

# The oldest glibc that this machine's compiler leaves to the wheel; in the container of a hosted runner it is 2.28.
PLATFORM ?= manylinux_2_34_x86_64
TORCH ?= 2.6.0 2.13.0

# RLHF_FAST_CUDA=OFF makes one without CUDA in half a minute; DIST is where it goes.
DIST ?= dist

# setuptools packs all that lies in build/lib*, also what an earlier build left there.
wheel: $(VENV)/ready
	rm -rf $(DIST) build/lib*
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w $(DIST)/linux .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --plat $(PLATFORM) -z 9 -w $(DIST) $(DIST)/linux/*.whl
	ls -l $(DIST)/*.whl

# The wheel of `make wheel` in empty environments with torch alone, one for each version in TORCH, and the tests of the ops
# there. PyPI's Linux builds bring 3 GB of CUDA along: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has small ones.
wheel-check:
	$(PYTHON) .ci/check_wheel.py $(DIST)/*.whl $(TORCH)

# On a machine with a GPU: no network, no virtual environment, the Python that has torch. Ends within ten minutes, with a
# table. STEPS="build kernels" runs those alone.
gpu-check:
	$(PYTHON) -u benchmarks/gpu_check.py $(STEPS)

clean:
	rm -rf $(VENV) build dist site *.egg-info rlhf_fast/*.so

# The site, into site/: needs no compiler.
.PHONY: docs
docs:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) mkdocs-material
	$(BIN)/python -m mkdocs build --strict
