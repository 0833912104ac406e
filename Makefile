# `make demo` and `make test` do all set-up themselves, from a bare checkout.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
BUILT_FROM := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/cpu/* kernels/cuda/*)

.PHONY: demo test lint bench wheel gpu-check clean

$(VENV)/ready: $(BUILT_FROM)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy "setuptools>=77" wheel pybind11 cmake ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e ".[train,triton,test,bench]" ruff mypy clang-format
	touch $@

demo: $(VENV)/ready
	$(BIN)/rlhf-fast demo

test: $(VENV)/ready
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.hpp' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

bench: $(VENV)/ready
	$(BIN)/rlhf-fast bench --out benchmarks/results

wheel: $(VENV)/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .
	ls -l dist

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
