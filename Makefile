# The targets are the manual: setup native demo test lint coverage wheel-test bench mutate, test-native test-kernels
# test-clients test-cluster kernel-table test-gpu bench-gpu bench-gpu-peer.
# `make demo` or `make test` is the only command needed on a fresh machine with Python 3.11.

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
ifdef TORCH  # `make setup TORCH=2.11.0`: another torch than the pinned one, in an environment of its own
VENV := .venv-torch-$(TORCH)
CONSTRAINTS := build/constraints-torch-$(TORCH).txt
endif
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KERNELS := .venv-kernels/bin
CLIENTS := .venv-clients/bin
CLUSTER := .venv-cluster/bin
DEMO_OUT := out/demo
FORECAST := out/forecast
NATIVE := src/windlass/kernels/cpu/libwindlass_cpu.so
NATIVE_SOURCES := $(wildcard native/*.py native/CMakeLists.txt native/include/*.h native/src/*)
PYTHON_FILES := src tests bench scripts demo native setup.py

.PHONY: setup native demo test test-all test-native coverage lint types format wheel wheel-test bench bench-kernels \
  bench-peers bench-servers bench-ablation bench-prediction bench-prefetcher bench-latency bench-decode bench-drafts \
  golden mutate test-kernels test-clients test-cluster kernel-table check-kernel-table test-gpu bench-gpu \
  bench-gpu-peer clean

setup: $(STAMP) native

$(STAMP): pyproject.toml $(CONSTRAINTS) setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

build/constraints-torch-%.txt: constraints.txt
	mkdir -p build && sed 's/^torch==.*/torch==$*/; /^triton==/d' $< > $@

# Beside the other: torch for CPUs needs no Triton, and tests of kernels no linters.
.venv-kernels/.installed: pyproject.toml constraints.txt setup.py
	test -x $(KERNELS)/python || $(PYTHON) -m venv .venv-kernels
	$(KERNELS)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[kernels-test]'
	touch $@

# Programs that drive the server, beside the others: guidellm wants other versions than these.
.venv-clients/.installed: pyproject.toml constraints.txt tests/clients/requirements.txt tests/clients/package.json
	test -x $(CLIENTS)/python || $(PYTHON) -m venv .venv-clients
	$(CLIENTS)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' \
	  -r tests/clients/requirements.txt
	test -x .venv-clients/guidellm/bin/python || $(PYTHON) -m venv .venv-clients/guidellm
	.venv-clients/guidellm/bin/python -m pip install --quiet --disable-pip-version-check 'guidellm==0.8.*'
	! command -v npm || npm install --prefix tests/clients --no-package-lock --silent
	touch $@

# Ray, beside the others: nobody else needs it.
.venv-cluster/.installed: pyproject.toml constraints.txt setup.py
	test -x $(CLUSTER)/python || $(PYTHON) -m venv .venv-cluster
	$(CLUSTER)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,ray]'
	touch $@

native: $(NATIVE)

# Without a compiler one line says so, and torch's kernels are used.
$(NATIVE): $(NATIVE_SOURCES) | $(STAMP)
	$(BIN)/python native/build_native.py

demo: setup
	rm -rf $(DEMO_OUT) && mkdir -p $(DEMO_OUT)
	$(BIN)/windlass run-batch -i examples/prompts.jsonl -o $(DEMO_OUT)/answers.jsonl \
	  --model demo --moe-expert-cache-size 8 --trace $(DEMO_OUT)/trace.json
	$(BIN)/python scripts/show_answers.py examples/prompts.jsonl $(DEMO_OUT)/answers.jsonl

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

# The native kernels in C++: sanitizers, emulated processors, instructions. Skips what is not there.
test-native: $(STAMP)
	$(BIN)/python native/tests/run.py

# Triton's kernels in its interpreter, on any machine.
test-kernels: .venv-kernels/.installed
	TRITON_INTERPRET=1 $(KERNELS)/python -m pytest tests/kernels_triton

# lm-eval, guidellm and npm's openai drive the server; what is not installed is skipped by name.
test-clients: .venv-clients/.installed native
	PATH="$$PATH:$(CURDIR)/.venv-clients/guidellm/bin" $(CLIENTS)/python -m pytest -rs tests/clients

# Nodes of a real Ray cluster on this machine, killed at random moments (KILL_SEED repeats them).
test-cluster: .venv-cluster/.installed native
	$(CLUSTER)/python -m pytest -rs tests/cluster

# What ptxas makes of them for each architecture, no GPU needed; a check that none of it got worse.
kernel-table check-kernel-table: .venv-kernels/.installed
	$(KERNELS)/python bench/gpu/kernel_table.py $(if $(filter check-%,$@),--check) bench/gpu/kernel_table.json

test-all: setup
	HYPOTHESIS_PROFILE=new $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

# What `make test` reaches of src/ in its own processes, a figure to look at now and then. Takes twice
# as long. The one test that counts seconds would count those of the tracing.
coverage: setup
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu" -k "not are_quick" --cov --cov-report=term:skip-covered

# The source archive, the wheel built from it, and that wheel at work in a clean environment.
wheel: $(STAMP)
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --outdir dist

wheel-test: wheel
	$(BIN)/python scripts/smoke_wheel.py dist/*.whl --constraints $(CONSTRAINTS)

lint: setup
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_sizes.py

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/ruff check --fix $(PYTHON_FILES)

bench: bench-kernels
	$(BIN)/python bench/offload.py --json bench/results/offload.json
	$(BIN)/python bench/kv_error.py --json bench/results/kv_error.json

bench-kernels: setup
	$(BIN)/python bench/kernels.py --json bench/results/kernels.json

bench-peers: setup
	$(BIN)/python -m bench.peers --json bench/results/peers.json --resume

# LLAMA_SERVER=<llama.cpp's llama-server>
bench-servers: setup
	$(BIN)/python -m bench.servers $(if $(LLAMA_SERVER),--llama-server $(LLAMA_SERVER)) \
	  --json bench/results/servers.json

bench-ablation: setup
	$(BIN)/python bench/ablation.py --grid --json bench/results/ablation.json

# Predicted beside measured, on models that bench-peers leaves in out/peers.
bench-prediction: setup
	$(BIN)/python bench/prediction.py --models $(addprefix out/peers/qwen3-moe-1b/,bf16 int8 int4) \
	  --budgets 0 0.5 --json bench/results/prediction.json

bench-prefetcher: setup
	$(BIN)/python bench/prefetcher.py

# One sequence on the trained models of bench/forecast_models.py. OLD=<src folder of other code>
# One sequence with experts on disk, of the demo model and of a larger one that is trained for it (half
# an hour, once; the text comes from Debian packages), both with experts of 2 MiB.
bench-latency: $(foreach name,demo 12x64,$(FORECAST)/$(name)-padded/config.json $(FORECAST)/$(name).trace)
	for name in demo 12x64; do \
	  $(BIN)/python bench/latency.py --model $(FORECAST)/$$name-padded --prompts $(FORECAST)/$$name.prompts.jsonl \
	    --settings learned off off/lfru finemoe/finemoe --json bench/results/latency-$$name.json $(if $(OLD),--src $(OLD)) \
	  || exit; done

build/demo-data/heldout.jsonl: | setup
	$(BIN)/python demo/data.py

$(FORECAST)/model-12x64/config.json: build/demo-data/heldout.jsonl
	$(BIN)/python demo/larger.py --out $(@D)

$(FORECAST)/demo-padded/config.json: | setup
	$(BIN)/python bench/forecast_models.py demo $(@D)

$(FORECAST)/12x64-padded/config.json: $(FORECAST)/model-12x64/config.json
	$(BIN)/python bench/forecast_models.py $(<D) $(@D)

$(FORECAST)/demo.trace: build/demo-data/heldout.jsonl
	$(BIN)/python bench/forecast_traces.py demo $@

$(FORECAST)/12x64.trace: $(FORECAST)/model-12x64/config.json
	$(BIN)/python bench/forecast_traces.py $(<D) $@

bench-decode: setup
	$(BIN)/python bench/decode_from_disk.py $(if $(OLD),--src $(OLD))

bench-drafts: setup
	$(BIN)/python bench/drafts.py

golden: setup
	$(BIN)/python scripts/golden_table.py

mutate: setup
	$(BIN)/python scripts/mutate.py

# On a machine with a GPU, from src/, nothing installed: GPU_PYTHON is one that has torch with CUDA and
# its Triton, pytest, tokenizers, safetensors, jinja2.
GPU_PYTHON ?= python3
GPU_RUN := PYTHONPATH=src $(GPU_PYTHON)
SIZE ?= kernels

# What is marked `gpu`, then the kernels' own script.
test-gpu: | out/gpu
	$(GPU_RUN) -m pytest -m gpu -rs tests/gpu tests/doctor
	$(GPU_RUN) bench/gpu/kernels.py --out out/gpu

# SIZE=kernels, or deepseek-v2-lite-8, qwen3-30b-16, mixtral-16, mixtral-24, gpt-oss-8: each fits ten
# minutes. MORE="--layers 16" and the like go to the script.
bench-gpu: | out/gpu
	$(GPU_RUN) $(if $(filter kernels,$(SIZE)),bench/gpu/kernels.py,bench/gpu/engine.py --size $(SIZE)) \
	  --out out/gpu $(MORE)

# transformers with accelerate under the same cap.
bench-gpu-peer: | out/gpu
	$(GPU_RUN) bench/gpu/peer_transformers.py --size $(SIZE) --out out/gpu $(MORE)

out/gpu:
	mkdir -p $@

clean:
	rm -rf $(VENV) .venv-kernels .venv-clients .venv-cluster tests/clients/node_modules $(NATIVE) build dist out .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis
