# Everything runs in .venv, which is made on first use and again when its lists of packages change.
# make PYTHON=python3.12 install  chooses the interpreter.

PYTHON ?= python3
TAG ?=
PAIR ?= base
TRAINER ?= gkd
OUT ?= runs/demo
WORKERS ?= 2

BIN := .venv/bin
LOWEST := tests/rendering tests/batches tests/vocabulary tests/checkpoints/test_resume.py tests/watching \
	$(addprefix tests/trainers/test_,gkd.py minillm.py) -m "not nightly"
PYTEST := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: help install test test-real test-server nightly audit check lint docs demo bench bench-gpu smoke lowest dist release-check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo [PAIR=base|instruct] [TRAINER=gkd|minillm]   distil one real model into another, results in $(OUT)"
	@echo "make bench       speed and memory beside TRL and beside the bare models, results in runs/bench"
	@echo "make bench-gpu   where there is a CUDA device: the loss stage on it, then the tests of one"
	@echo "make test        fast tests"
	@echo "make check       ruff, mypy, the tests and the commands of the documentation"
	@echo "make test-real   tests with the real models and tokenizers; fetches them"
	@echo "make test-server  tests with a real vLLM server on the CPU; installs it (3.4 GB)"
	@echo "make nightly     long fuzzing, many kills, a minute of load, verl's own code"
	@echo "make audit       known faults of the installed packages; needs the network"
	@echo "make docs        the documentation as a site in build/docs, warnings as errors"
	@echo "make smoke       the wheel alone in an empty environment: the commands of a first hour, on tiny models"
	@echo "make lowest      the same, and tests, with the lowest versions that pyproject.toml declares"
	@echo "make release-check [TAG=v0.1.0]   do version, changelog and citation agree?"
	@echo "make dist        wheel and source distribution in dist/"
	@echo "make install     only .venv"
	@echo "make clean       remove .venv, caches and runs"

install: .venv/.installed

# torch first and alone: which of its builds is wanted is decided here, before anything else asks for one.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test: .venv/.installed
	$(PYTEST) -n $(WORKERS) -m "not real and not nightly"

test-real: .venv/.installed .venv/deepspeed/.installed
	$(BIN)/python demo/assets.py get smollm2-135m-instruct gemma-3-270m tokenizers texts
	$(BIN)/python tests/support/browser.py
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "real and not nightly and not server"

test-server: .venv/.installed
	$(BIN)/python demo/assets.py get smollm2-135m-instruct
	$(BIN)/python demo/vllm_server.py install
	$(PYTEST) -m server

nightly: .venv/.installed .venv/verl/.installed
	$(BIN)/python demo/assets.py get smollm2-135m-instruct tokenizers
	$(PYTEST) -m nightly

# verl's own Python code, for the test of its plug-in: beside the environment, whose versions it would change.
VERL = verl==0.9.1 tensordict==0.10.0 ray==2.60.0 hydra-core==1.3.8 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 \
	torchdata==0.11.0 codetiming==1.4.0 cachetools==8.0.2 cloudpickle==3.1.3 dill==0.4.1 importlib-metadata==10.2.0 \
	msgpack==1.2.4 orjson==3.13.0 pybind11==3.1.0 pylatexenc==2.11 pyvers==0.2.3 zipp==4.1.2
.venv/verl/.installed: .venv/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/verl $(VERL)
	touch $@

# For the tests of ZeRO: beside the environment, since whoever has it imports it at every start.
DEEPSPEED = deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0
.venv/deepspeed/.installed: .venv/.installed
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-deps --target .venv/deepspeed $(DEEPSPEED)
	touch $@

# Known faults of the pinned packages; asks PyPI's database, and fails where it cannot be asked about one of them.
audit: .venv/audit/.installed
	.venv/audit/bin/python tests/support/audit.py

.venv/audit/.installed:
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	touch $@

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# The variable silences an advertisement of the theme.
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What pip gives a user, without .venv, so that any PYTHON can be tried. setuptools would pack again what an earlier
# build left in build/lib, deleted modules included. -I: pip would count a diglot on PYTHONPATH as installed.
smoke:
	rm -rf build/smoke build/lib build/bdist.*
	$(PYTHON) -m venv build/smoke/env
	build/smoke/env/bin/python -I -m pip wheel --quiet --no-deps --wheel-dir build/smoke .
	build/smoke/env/bin/python -I -m pip install --quiet build/smoke/*.whl
	cd build/smoke && env/bin/python -I $(CURDIR)/tests/support/smoke.py

# The same with the lowest versions that are declared, and the tests that touch most of the parents' code: the trainers'
# hooks, tokenizers, templates. DeepSeek's tokenizer is among the real ones.
lowest:
	rm -rf build/lowest build/lib build/bdist.*
	$(PYTHON) -m venv build/lowest/env
	build/lowest/env/bin/python tests/support/lowest.py > build/lowest/constraints.txt
	build/lowest/env/bin/python -I -m pip wheel --quiet --no-deps --wheel-dir build/lowest .
	build/lowest/env/bin/python -I -m pip install --quiet --constraint build/lowest/constraints.txt build/lowest/*.whl peft hypothesis pytest
	cd build/lowest && env/bin/python -I $(CURDIR)/tests/support/smoke.py
	build/lowest/env/bin/python demo/assets.py get tokenizers smollm2-135m-instruct
	$(PYTEST:$(BIN)/%=build/lowest/env/bin/%) $(LOWEST)

dist:
	rm -rf dist build/dist build/lib build/bdist.*
	$(PYTHON) -m venv build/dist
	build/dist/bin/python -m pip install --quiet build
	build/dist/bin/python -m build --outdir dist .

# Needs no package, so that it can run before anything is installed.
release-check:
	$(PYTHON) tests/support/release.py $(TAG)

demo: .venv/.installed
	THP_MEM_ALLOC_ENABLE=1 HF_HUB_OFFLINE=1 $(BIN)/python demo/run.py --pair $(PAIR) --trainer $(TRAINER) --out $(OUT)

bench: .venv/.installed
	$(BIN)/python demo/assets.py get smollm2-135m-instruct gemma-3-270m tokenizers texts
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/bench.py

# The benchmark first says whether there is a card; without one nothing else is run.
bench-gpu: .venv/.installed
	$(BIN)/python benchmarks/gpu.py
	$(PYTEST) -m cuda

clean:
	rm -rf .venv runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
