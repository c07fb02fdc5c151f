# Each target makes .venv if it is missing; nothing else has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
# Compiled modules are kept even where the environment forbids it: else each worker of the tests, and each command that
# they start, compiles all of them again.
unexport PYTHONDONTWRITEBYTECODE
# These run with the shapes and dtypes of every call checked (tests/support/shapes.py).
MATHEMATICS := tests/diffusion tests/loss tests/sampling

.PHONY: demo test test-others test-slurm test-versions check docs bench clean help  # and test-python-3.12, test-python-3.13

help:
	@echo "make demo   real text -> tokenizer -> training on 8 CPU ranks, resumed on 2 -> held-out ELBO -> samples ->"
	@echo "            Hugging Face"
	@echo "make test   the test suite"
	@echo "make test-versions  what depends on them, with the newest megatron-core and with Transformer Engine's layers"
	@echo "make test-python-3.12 (or 3.13)  layouts, resumption and checkpoints with another Python"
	@echo "make check  ruff, pyright, import rules"
	@echo "make docs   the pages of docs/ as a site in site/; a broken link is an error"
	@echo "make bench  what a CPU can measure: noising, the output head, a training step, a save's stall, sampling, the cache of"
	@echo "            finished blocks, memory of a 10B export, start-up, long runs (half an hour, 11 GB of memory, 20 GB of disk)"
	@echo "pip heeds its own variables: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo"
	@echo "            installs torch's CPU build instead of 5.8 GB of CUDA libraries"

$(STAMP): setup.py requirements/cpu.txt requirements/hf.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements/cpu.txt -c requirements/hf.txt -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python tools/demo.py

# The tests of Slurm wait for the scheduler most of the time, so they run beside the others; their output comes when they
# have ended. If either part fails, the other one still runs to its end, and the exit status is that of a failure.
test: $(STAMP)
	$(MAKE) --no-print-directory --keep-going --jobs 2 test-slurm test-others

test-others: $(STAMP)
	MEGADIFF_CHECK_SHAPES=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(MATHEMATICS)
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --ignore=tests/slurm $(MATHEMATICS:%=--ignore=%)

test-slurm: $(STAMP)
	@$(BIN)/python -m pytest tests/slurm > $(VENV)/slurm-tests.log 2>&1; \
	    status=$$?; cat $(VENV)/slurm-tests.log; exit $$status

# Other versions of libraries, unpacked beside the environment: the newest megatron-core supported, whose metadata wants
# Python 3.12 and whose code does not, and Transformer Engine without its compiled part.
VERSIONS := .versions
UNPACK := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade
CORE := 0.19.2
$(VERSIONS)/.installed: $(STAMP) Makefile
	$(UNPACK) --ignore-requires-python --target $(VERSIONS)/core megatron-core==$(CORE)
	$(UNPACK) --target $(VERSIONS)/engine transformer_engine==2.11.0
	@touch $@

test-versions: export MEGADIFF_OTHER_CORE := $(CURDIR)/$(VERSIONS)/core
test-versions: export MEGADIFF_TRANSFORMER_ENGINE := $(CURDIR)/$(VERSIONS)/engine
test-versions: $(VERSIONS)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/checkpoint/test_other_core.py tests/model/test_fused_layers.py \
	    tests/run/test_engine_dry_run.py
	MEGADIFF_CORE_VERSION=$(CORE) PYTHONPATH=$(MEGADIFF_OTHER_CORE) \
	    $(BIN)/python -m pytest -n 2 --dist loadfile tests/platform tests/optim \
	    tests/checkpoint/test_extra_state.py tests/checkpoint/test_safe_metadata.py tests/model/test_fused_layers.py \
	    tests/model/test_direct_layer.py tests/model/test_layers.py tests/model/test_initialisation.py \
	    tests/distributed/test_layouts.py tests/distributed/test_resume.py \
	    tests/distributed/test_wrong_on_purpose.py tests/run/test_dry_run.py \
	    tests/run/test_engine_dry_run.py

# An environment with another Python (`make test-python-3.12 OTHER_PYTHON=python3.12`), which gets the newest megatron-core:
# what depends on versions, in a few minutes.
OTHER_PYTHON ?= python$*
$(VERSIONS)/python-%/.installed: setup.py requirements/cpu.txt
	$(OTHER_PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c requirements/cpu.txt -e ".[fast]" \
	    pytest pytest-xdist pytest-timeout hypothesis jaxtyping beartype
	@touch $@

.PRECIOUS: $(VERSIONS)/python-%/.installed
test-python-%: $(VERSIONS)/python-%/.installed
	PYTHONPATH=$(CURDIR) $(<D)/bin/python tools/benchmarks/layout_parity.py --at-most 1e-5
	$(<D)/bin/python -m pytest -n 2 --dist loadfile tests/platform tests/optim/test_optimizer.py \
	    tests/distributed/test_resume.py tests/checkpoint/test_extra_state.py tests/checkpoint/test_safe_metadata.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python .ci/prose.py

# An environment of its own: the pages need nothing of what trains.
DOCS := .venv-docs
$(DOCS)/.installed: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	@touch $@

docs: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs build --strict --quiet

bench: $(STAMP)
	$(BIN)/python tools/benchmarks/noising.py --sequences 1 4 16 --repeats 3 --tokens 262144
	$(BIN)/python tools/benchmarks/head.py
	$(BIN)/python tools/benchmarks/training_step.py --rounds 7
	$(BIN)/python tools/benchmarks/checkpoint_stall.py --saves 7
	$(BIN)/python tools/benchmarks/cached_blocks.py --runs 5
	$(BIN)/python tools/benchmarks/sampling.py --length 16 --steps 8
	$(BIN)/python tools/benchmarks/export_memory.py
	$(BIN)/python tools/benchmarks/startup.py
	$(BIN)/python tools/benchmarks/long_runs.py --lines 100000

clean:
	rm -rf $(VENV) $(DOCS) $(VERSIONS) site build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
