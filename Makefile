# make setup | train | study | test | test-all | lint | lock | results | bench: each sets up what it needs.
PYTHON ?= python3
EXTRAS ?= dev
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed-$(EXTRAS)
PROJECTS := pyproject.toml model/selective_attention/pyproject.toml model/inference_budget/pyproject.toml
.DELETE_ON_ERROR:
.PHONY: setup train study test test-all test-exhaustive test-faults soak lint lock results bench clean

setup: $(STAMP)

$(STAMP): constraints.txt $(PROJECTS)
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) found; install Python 3.11 or newer, or run: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is $$($(PYTHON) -V); Python 3.11 or newer is needed, e.g. make PYTHON=python3.11"; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) -m venv failed; on Debian or Ubuntu install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt \
	    --editable model/selective_attention --editable model/inference_budget --editable ".[$(EXTRAS)]" \
	    || { echo "error: installing failed (see above); check the network to the package index, then run make setup again"; exit 1; }
	@touch $@

train: setup
	@$(RUN) -m launch.demo --workdir runs/demo --report report

# The paper at small scale, in pieces: run it again, it goes on. PRESET=full takes hours.
PRESET := small
study: setup
	@$(RUN) -m launch.study --preset=$(PRESET)

# Each process begins with one half of the tests in their order, so that it makes what a file's tests share once.
PYTEST := $(RUN) -m pytest -n 2 --dist worksteal
test: setup
	@$(PYTEST) -m "not slow and not exhaustive" tests

# What CI runs: long tests too, though not those that compile every shipped config and the longest contexts for TPUs.
test-all: setup
	@$(PYTEST) -m "not exhaustive" tests

test-exhaustive: setup
	@$(PYTEST) -m exhaustive tests

# Real pods on this machine, hosts killed and stopped at random, damaged files, full disks.
test-faults: setup
	@$(RUN) -m pytest -s tests/trainer/hosts tests/trainer/checkpoints tests/trainer/test_bad_numbers.py tests/trainer/test_resume.py

# Hours: 100,000 steps of a tiny model, 200 restarts and resizes, and what has grown at the end.
soak: setup
	@$(RUN) benchmarks/soak.py

lint: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/lint-imports --config pyproject.toml
	@$(VENV)/bin/mypy
	@$(VENV)/bin/shellcheck -x -a launch/*.sh launch/pod/*.sh
	@$(VENV)/bin/shfmt -i 2 -ci -d launch

# After a change of constraints.txt: what hosts of a slice install, with hashes.
lock: setup
	@$(RUN) -m pip install --quiet --constraint constraints.txt uv
	@$(RUN) -m launch.lock

# The tables of docs/ that the TPU compiler makes: all, or those whose command has the word ONLY.
results:
	@$(MAKE) --no-print-directory setup EXTRAS=dev,tpu
	@JAX_PLATFORMS=cpu $(RUN) docs/tables.py $(ONLY)

# libtpu for the kernels' schedules, and the peers of data; the clock runs on the CPU.
bench:
	@$(MAKE) --no-print-directory setup EXTRAS=dev,tpu,benchmark
	@for benchmark in $(filter-out benchmarks/soak.py,$(sort $(wildcard benchmarks/*.py))); do echo "== $$benchmark"; JAX_PLATFORMS=cpu $(RUN) $$benchmark || exit 1; done

clean:
	rm -rf runs report $(VENV)
