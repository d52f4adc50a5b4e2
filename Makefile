# The commands a person needs. Each sets up what is missing, once.
#
#   make demo    the organism behind a guarded server    ARGS="--once" and the like
#   make test    the test suite                          ARGS="-k clamp" WORKERS=0
#                with all that takes long, as in CI       ARGS=--slow
#   make check   lint, format, types, import contract
#   make fuzz    many more hostile files and requests    CASES=10000
#   make docs    the generated parts of docs/
#   make sbom    build/sbom.json: what an installation is made of, with licences
#   make bench   benchmarks/results/*.json

SHELL := /bin/bash
PYTHON ?=
ARGS ?=
# Processes among which tests are divided; 0 is one, with a terminal of its own.
WORKERS ?= 2
CASES ?= 5000
bin := .venv/bin
# Subprocesses of the tests find `guard`, and a Prometheus of our own, by name.
export PATH := $(CURDIR)/$(bin):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz check docs sbom bench clean

help:
	@sed -n 's/^#   //p' Makefile

demo: .venv/.ready
	$(bin)/guard demo $(ARGS)

test: .venv/.ready .venv/.prometheus-ready
	$(bin)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

fuzzed = tests/fuzz tests/http tests/vllm_guard/test_hostile.py \
	tests/test_policy.py tests/test_request.py tests/test_drill.py tests/test_certificate.py

# For each parser so many inputs, drawn anew every time; the suite has 80 of each.
fuzz: .venv/.ready
	GUARD_FUZZ_CASES=$(CASES) $(bin)/python -m pytest --timeout 86400 \
		$(fuzzed) $(ARGS)

check: .venv/.ready
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/lint-imports

docs: .venv/.ready
	$(bin)/python .ci/reference.py

sbom: .venv/.ready
	$(bin)/python .ci/sbom.py build/sbom.json

bench: .venv/.ready build/organism-1
	$(bin)/python -m benchmarks.overhead $(ARGS)
	$(bin)/python -m benchmarks.scores
	$(bin)/python -m benchmarks.host
	$(bin)/python -m benchmarks.streams
	$(bin)/python -m benchmarks.reload
	$(bin)/python -m benchmarks.soak
	$(bin)/python -m benchmarks.memory
	$(bin)/python -m benchmarks.false_alarms
	$(bin)/python -m benchmarks.drift
	$(bin)/python -m benchmarks.detection --organism build/organism-1
	$(bin)/python -m benchmarks.constrained --organism build/organism-1
	$(bin)/guard certify --policy guard/demo/organism/policy.yaml \
		--output benchmarks/results/certificate.json
	$(bin)/guard certify --policy build/organism-1/policy.yaml \
		--output benchmarks/results/certificate-1.json

# Another model and SAE: what is claimed of monitors is not about one seed.
build/organism-1: | .venv/.ready
	$(bin)/python -m guard.demo.rebuild $@ --seed 3

clean:
	rm -rf .venv

# Stamps: set up again only when what they were built from has changed.
.venv/.ready: pyproject.toml .ci/setup
	PYTHON="$(PYTHON)" .ci/setup venv
	@touch $@

.venv/.prometheus-ready: .ci/setup | .venv/.ready
	.ci/setup prometheus
	@touch $@
