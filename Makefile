# Each target does its own set-up. With PYTHON=python3 VENV=none the targets use the packages that
# this Python has and touch no network; otherwise they make a virtual environment, with the versions
# that pyproject.toml pins.
PYTHON ?= python3
VENV ?= .venv
export MAX_JOBS ?= 2

ifeq ($(VENV),none)
PY := $(PYTHON)
BIN :=
READY :=
else
PY := $(VENV)/bin/python
BIN := $(VENV)/bin/
READY := $(VENV)/.ready
endif

# Where nothing may be installed, tests may have to run one by one.
AT_ONCE = $(shell $(PY) -c 'import xdist; print("-n $(MAX_JOBS) --dist loadfile")' 2>/dev/null)

CXX_SOURCES = $(shell find csrc tests/emulation tests/export -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# A linter that is missing is an error, except where nothing may be installed: there it is said.
lint_with = if command -v $(BIN)$(1) >/dev/null; then echo "$(1)"; $(BIN)$(1) $(2); \
	elif [ '$(VENV)' = none ]; then echo "$(1) is not installed: skipped"; \
	else echo "$(1) is missing from $(VENV): run make clean" >&2; exit 1; fi

.PHONY: demo test test-sanitized test-matrix lint build wheel docs bench bench-peers bench-compare recipes sass-report gpu-report clean

# Of the CPU kernels those that this machine runs, unless told otherwise: the other instruction
# sets' would double the time. Whatever needs them (test, bench, build) adds them.
demo: export REG_KERNELS_ISA ?= native
demo: build
	$(PY) -m reg_kernels train --data digits --augment --seeds 3 --out runs/digits

# Two processes, a file each at a time, with a thread each: idle threads must not spin beside them.
# What is timed comes after them, alone.
TIMED = tests/every_op/test_instruction_sets.py
test: lint build
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q $(AT_ONCE) tests --ignore=$(TIMED)
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q $(TIMED)

# The native CPU kernels under ASan and UBSan, for this machine's best instruction set and, where that
# is AVX-512, for AVX2: the op suites and many more hostile calls; then their loops, shared out to
# threads, under ThreadSanitizer. A package of its own below build/, which -P keeps the one in this
# folder from standing before. Python itself leaks, so that tests/ops/test_leaks.py counts instead;
# libstdc++ comes along since libasan looks for what throws when it is loaded.
SANITIZED_ISAS ?= native$(if $(shell grep -m1 -ow avx512vl /proc/cpuinfo), avx2)
PRELOADED = $(foreach lib,libasan.so libstdc++.so,$$($${CXX:-g++} -print-file-name=$(lib)))
SANITIZED_PY = LD_PRELOAD="$(PRELOADED)" \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1 \
	UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1 \
	PYTHONPATH=$(CURDIR)/$$built OMP_WAIT_POLICY=passive $(PY)

test-sanitized: $(READY)
	@set -ex; for isa in $(SANITIZED_ISAS); do built=build/sanitized-$$isa; \
		REG_KERNELS_SANITIZE=1 REG_KERNELS_ISA=$$isa $(PY) setup.py -q build --build-lib $$built; \
		$(SANITIZED_PY) -P -c "from reg_kernels import _C; assert '$$built' in _C.__file__; \
			assert '$$isa' in ('native', *_C.isas())"; \
		$(SANITIZED_PY) -W ignore tests/hostile_calls.py --seed 1 --calls $(or $(CALLS),40000); \
		$(SANITIZED_PY) -P -m pytest -q $(AT_ONCE) \
			-o "pythonpath=$$built . tests tests/emulation tests/triton_kernels" tests/every_op tests/ops tests/nn \
			tests/optim tests/augment tests/adversarial \
			-k "not triton and not reference and not compile and not opcheck"; \
	done
	REG_KERNELS_SANITIZE=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -q tests/emulation/test_threads.py

lint: $(READY)
	@$(call lint_with,ruff,check --quiet .)
	@$(call lint_with,ruff,format --quiet --check .)
	@$(call lint_with,mypy,--no-error-summary)
	@$(call lint_with,clang-format,--dry-run -Werror $(CXX_SOURCES))

build: $(READY)
	$(PY) setup.py -q build_ext --inplace

# What is published, in dist/.
wheel: $(READY)
	$(PY) -m bench.wheels

# The wheel beside other Pythons and torches, as far as they are at hand; fetches gigabytes.
test-matrix: $(READY)
	$(PY) -m bench.matrix $(if $(ONLY),--only $(ONLY))

# The site of README, docs/ and the docstrings; tests/test_docs.py builds it, too.
docs: $(READY)
	$(PY) -m sphinx -W --keep-going -q -c docs . build/docs
	@echo "wrote build/docs/README.html"

# The dependencies first and without a build of their own; `build` then compiles against them, and
# only what has changed. Python compiles what is imported as it is: pip would take half a minute for
# all that there is.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	REG_KERNELS_BUILD=none $(PY) -m pip install --quiet --no-compile --editable '.[dev]'
	touch $@

# What was written is in the README even where something failed.
bench: build
	$(PY) -m bench.report --time-limit 840; code=$$?; $(PY) -m bench.readme_table && exit $$code

# Without what they depend on: timm's torchvision does not load beside a CPU build of torch.
bench-peers: $(READY)
	$(PY) -m pip install --quiet --no-deps $(shell sed -n 's/^peers = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',')

# The scripts of docs/recipes/ and the tests of what they use, beside the libraries that they are
# for. The package is found by its path: one build of the native code serves any torch.
RECIPES ?= build/recipes
RECIPES_PY = PYTHONPATH=$(CURDIR) OMP_WAIT_POLICY=passive $(RECIPES)/bin/python
recipes: build $(RECIPES)/.ready
	@set -e; for script in $(filter-out %/digits.py,$(wildcard docs/recipes/*.py)); do \
		echo "$$script"; $(RECIPES_PY) $$script $(if $(STEPS),--steps $(STEPS)); done
	$(RECIPES_PY) -m pytest -q tests/test_recipes.py tests/integrations tests/optim/test_trainers.py \
		tests/test_reference.py

$(RECIPES)/.ready: pyproject.toml
	$(PYTHON) -m venv $(RECIPES)
	$(RECIPES)/bin/python -m pip install --quiet --no-compile \
		$(shell sed -n '/^recipes = \[/,/^\]/s/^ *"\(.*\)",/\1/p' pyproject.toml)
	touch $@

# What got worse since OLD, a git revision or a report.json, in NEW, by default this machine's report.
OLD ?= HEAD
bench-compare: $(READY)
	$(PY) -m bench.compare $(OLD) $(NEW)

# Needs nvcc and triton, no GPU: what the machine code of every GPU kernel says.
sass-report: $(READY)
	$(PY) -m bench.sass_report

# ONLY=tests,bench reruns those parts of the report.
gpu-report: $(READY)
	$(PY) -m bench.gpu_report $(if $(ONLY),--only $(ONLY)); code=$$?; \
		$(PY) -m bench.readme_table && exit $$code

clean:
	rm -rf $(filter-out none,$(VENV)) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks .hypothesis
	rm -f reg_kernels/*.so reg_kernels/_build.json
	find . -name __pycache__ -prune -exec rm -rf {} +
