# make run    set up, then post-train the embedded model on Countdown; make run STEPS=100 ARGS="--lr 1e-4" for other settings
# make test   set up, then run the tests; make test ARGS="-k buffer" for some
# make test-long   the tests that take minutes each
# make lint   set up, then check the style and the types
# make bench  the measurements there are; make bench BENCH=posterior ARGS="--help" for one
# make clean  remove .venv
# make help   these lines

PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3)
GPU := $(shell nvidia-smi -L 2>/dev/null | grep '^GPU')
REQUIREMENTS := $(if $(GPU),requirements.txt,requirements-cpu.txt)
TORCH := $(shell grep -i '^torch==' requirements-cpu.txt)

# What pip does, in a few lines.
PIP = PYTHONUNBUFFERED=1 .venv/bin/pip install --disable-pip-version-check --progress-bar off
SHOW = awk '/^Collecting/ && ++n % 25 == 0 { print "  " n " packages are here"; fflush() } \
	/^Installing/ { print "  unpacking them: a minute"; fflush() }'

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: run test test-long lint bench clean help

run: .venv/installed
	@.venv/bin/python tba.py $(if $(STEPS),--steps $(STEPS)) $(ARGS)

test: .venv/installed-dev
	@.venv/bin/python -m pytest -n 2 --dist worksteal -m "not long" $(ARGS)

test-long: .venv/installed-dev
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
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Python 3.11 is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# The CPU build of torch comes first and alone: PyTorch's own index has it where the usual one does not. The rest is a
# full list, installed with --no-deps: vLLM's CPU build asks for torchvision and its kin in builds that break here.
.venv/installed: .venv/bin/python $(REQUIREMENTS)
	@echo "installing $(REQUIREMENTS) into .venv: 2 to 5 minutes, once"; date +%s > .venv/began
ifeq ($(GPU),)
	@.venv/bin/pip install -q --no-deps $(TORCH) 2>/dev/null || \
		.venv/bin/pip install -q --no-deps --index-url https://download.pytorch.org/whl/cpu $(TORCH)
	@$(PIP) --no-deps -r requirements-cpu.txt | $(SHOW)
else
	@$(PIP) -r requirements.txt | $(SHOW)
endif
	@echo "installed in $$(( $$(date +%s) - $$(cat .venv/began) )) s"; touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	@echo "installing requirements-dev.txt into .venv: half a minute, once"
	@.venv/bin/pip install -q --no-deps --disable-pip-version-check -r requirements-dev.txt
	@touch $@
