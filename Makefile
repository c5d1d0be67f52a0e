# make run    set up, then post-train the embedded model on Countdown; make run STEPS=100 ARGS="--lr 1e-4" for other settings
# make test   set up, then run the tests

PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3)
GPU := $(shell nvidia-smi -L 2>/dev/null | grep '^GPU')
REQUIREMENTS := $(if $(GPU),requirements.txt,requirements-cpu.txt)
TORCH := $(shell grep -i '^torch==' requirements-cpu.txt)

.PHONY: help run test lint clean

help:
	@sed -n 's/^# \(make.*\)/\1/p' Makefile

run: .venv/installed
	@.venv/bin/python tba.py $(if $(STEPS),--steps $(STEPS)) $(ARGS)

test: .venv/installed-dev
	@.venv/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: .venv/installed-dev
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .

clean:
	rm -rf .venv

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Python 3.11 is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# The CPU build of torch comes first and alone: PyTorch's own index has it where the usual one does not. The rest is a
# full list, installed with --no-deps: vLLM's CPU build asks for torchvision and its kin in builds that break here.
.venv/installed: .venv/bin/python $(REQUIREMENTS)
	@echo "installing $(REQUIREMENTS) into .venv: 2 to 5 minutes, once"
ifeq ($(GPU),)
	@.venv/bin/pip install -q --no-deps $(TORCH) 2>/dev/null || \
		.venv/bin/pip install -q --no-deps --index-url https://download.pytorch.org/whl/cpu $(TORCH)
	@.venv/bin/pip install -q --no-deps --disable-pip-version-check -r requirements-cpu.txt
else
	@.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
endif
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	@.venv/bin/pip install -q --no-deps --disable-pip-version-check -r requirements-dev.txt
	@touch $@
