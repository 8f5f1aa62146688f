.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
FOLDER ?= demo

N ?= 2
GPUS ?= 1
SECONDS ?= 600

.PHONY: help install demo predict train up down test fast test-rgw fuzz chaos bench lint types clean

help:  ## Print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed  ## Make .venv from the pinned constraints

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: install  ## Segment sample images on two local Ray actors and write a report
	$(BIN)/unet-jobs demo $(FOLDER)

predict: install  ## Segment: make predict CONFIG=predict.toml
	$(BIN)/unet-jobs predict $(CONFIG)

train: install  ## Train: make train CONFIG=train.toml
	$(BIN)/unet-jobs train $(CONFIG)

up: install  ## A Ray cluster on this machine: make up N=4 GPUS=2 (pretended GPUs)
	$(BIN)/python cluster/local.py up $(N) --gpus $(GPUS)

down:  ## End it
	$(BIN)/python cluster/local.py down

test: lint types  ## Lint, types, tests
	$(BIN)/python -m pytest

fast: install  ## Tests of under two minutes
	$(BIN)/python -m pytest -m fast

test-rgw: install  ## The tests of object storage against a real Ceph (see tests/support/rgw.py)
	UNET_JOBS_TEST_STORE=rgw AWS_REQUEST_CHECKSUM_CALCULATION=when_required AWS_RESPONSE_CHECKSUM_VALIDATION=when_required \
	$(BIN)/python -m pytest -rs tests/jobs/test_s3.py tests/unet_core/storage/test_object_stores.py tests/jobs/test_store_faults.py

fuzz: install  ## Damaged files of every kind, for ten minutes: make fuzz SECONDS=600
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.tools.fuzz --seconds $(SECONDS)

chaos: install  ## Kill, stop and poison runs at every stage, 20 times each: an hour and a half
	$(BIN)/python -m tests.chaos --seed 1 --runs 20

bench: install  ## predict beside what people use instead, twenty minutes: docs/performance.md
	$(BIN)/python -m tests.benchmarks.peers --rounds 3 --page docs/performance.md

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

clean:  ## Remove the environment, the sample data and caches
	rm -rf .venv .cluster demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
