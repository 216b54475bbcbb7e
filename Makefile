# Every target does its own set-up: a virtual environment in .venv, filled by plain pip with the set that CI tests and
# re-used until pyproject.toml or constraints.txt change. To choose: make PYTHON=python3.12 VENV=/elsewhere CUDA=12

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
CUDA ?= 13
JOBS ?= 2
BIN := $(VENV)/bin
# The two flavours of DALI overwrite each other's files.
OTHER := $(if $(filter 12,$(CUDA)),130,120)
# Checksums and not file times decide, since a fresh checkout's files are all new.
WANTED := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' -) cu$(CUDA) $(CURDIR)
# One thread a process: the tests run side by side, file by file, in the order that tests/conftest.py gives them.
SHARED := -n $(JOBS) --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Tests of several machines, of engines and of time limits: one after the other, since two of them would be too many
# workers and engines at once. The others run beside them.
ALONE := $(patsubst %,tests/integration/test_%.py,nodes hangs preemption exact_resume docker_jobs docker_training \
  detector_jobs images compose every_door service_kills)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint test-integration bench bench-training bench-service bench-data soak variants clean

help: ## list what there is
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 20

setup: ## make or renew the environment
	@if [ "$$(cat $(VENV)/.lorot-installed 2>/dev/null)" = "$(WANTED)" ]; then exit 0; fi; \
	set -e; \
	if ! "$(PYTHON)" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; fi; \
	echo "Filling $(VENV) with pip: about 7 GB, four minutes on a fast line"; \
	"$(PYTHON)" -m venv "$(VENV)"; \
	"$(BIN)/python" -m pip uninstall --yes --quiet nvidia-dali-cuda$(OTHER) 2>/dev/null; \
	"$(BIN)/python" -m pip install --disable-pip-version-check -c constraints.txt -e '.[cu$(CUDA),dev]'; \
	echo "$(WANTED)" > "$(VENV)/.lorot-installed"

quickstart: setup ## generate data, train, register, localize, report: five minutes on two cores
	@$(BIN)/lorot quickstart

test: setup ## the unit tests
	$(PYTEST) $(SHARED) -m "not integration"

lint: setup ## ruff, the type checker, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) tests/test_architecture.py

test-integration: setup ## the tests that start servers and jobs; says what it leaves out (LOROT_NO_SKIPS=1: fails then)
	@said=$$(mktemp); trap 'rm -f "$$said"' EXIT; \
	$(PYTEST) -m integration -rs --durations=20 $(ALONE) > "$$said" 2>&1 & alone=$$!; \
	$(PYTEST) -m integration -rs --durations=20 $(addprefix --ignore=,$(ALONE)); others=$$?; \
	wait $$alone; ended=$$?; cat "$$said"; [ $$others = 0 ] && [ $$ended = 0 ]

bench: setup ## the benchmarks: ratios taken in one run
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m tests.benchmarks.step_vs_ddp \
	  --model resnet50 --size 224 --micro-batch 4 --rounds 8
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m tests.benchmarks.step_vs_ddp \
	  --model resnet_small --micro-batch 64 --rounds 40
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.pretext_cost
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.wsol_rate

bench-training: setup ## what checkpoints, determinism, a second worker, the record and a lost worker cost: a quarter of an hour
	for each in checkpoint_stall determinism_cost weak_scaling record_cost recovery_time plan_accuracy; do \
	  OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.$$each || exit 1; done

bench-service: setup ## the job service with 10,000 jobs in its record, 20 clients, 200 followers
	$(BIN)/python -m tests.benchmarks.service_load

bench-data: setup ## loaders side by side in one run: three quarters of an hour; fills .bench (see tests/benchmarks/data)
	$(BIN)/python -m tests.benchmarks.data

soak: setup ## half an hour of training under a random schedule of faults, and what it lost; needs root
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)); \
	soaked=$$?; LOROT_ROUNDS=20 $(PYTEST) -m integration tests/integration/test_exact_resume.py && [ $$soaked = 0 ]

variants: setup ## the paper's variants on Fashion-MNIST, three seeds each: a quarter of an hour (Debian: dataset-fashion-mnist)
	$(BIN)/python -m tests.benchmarks.variants

clean: ## remove caches and built files; data, runs and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find service pipelines tests -name __pycache__ -type d -prune -exec rm -rf {} +
