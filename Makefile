# Every target does all of its own set-up: a virtual environment in .venv with the versions of
# constraints.txt. Nothing is downloaded after that, but by `brain` and `volume` (one wheel, whose
# images are checked by hash) and `slurm-deps` (Debian's packages). PYTHON picks the interpreter
# (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
CONFIG ?= configs/quickstart.toml
export PYTHONUNBUFFERED := 1
# mkdocs-material advertises another tool at each build.
export NO_MKDOCS_2_WARNING := 1

.PHONY: help store brain volume quickstart test test-slow slurm-deps check docs bench gpu ahead \
  gpu-parity gpu-linear gpu-attention gpu-memory clean

help:
	@echo "make quickstart  prepare text, certify, then train one sequence of 1,048,576 bytes on 2 ranks"
	@echo "make brain       the ICBM152 brain with its tissues as a store of grids (11.5 MB by pip)"
	@echo "make volume      segment that brain as one sequence of 1.1 million tokens on 2 ranks"
	@echo "make store       only the token store that quickstart and bench read"
	@echo "make test        the tests (within 15 minutes on 2 cores)"
	@echo "make test-slow   the long tests (within 35 minutes)"
	@echo "make slurm-deps  Slurm, munge and shellcheck for the tests, by apt-get; nothing if present"
	@echo "make check       lint, format, types, docs build"
	@echo "make docs        build the site into site/"
	@echo "make bench       measure; JSON and tables into docs/benchmarks/"
	@echo "make gpu         the checks that need one CUDA card; says so and passes without one"
	@echo "make gpu-parity  errors of every operation on the card beside float64 and rivals"
	@echo "make gpu-linear, gpu-attention, gpu-memory  times on the card; no row begins after 8 minutes,"
	@echo "                 called again it goes on with what is left"
	@echo "make ahead       compile every Triton kernel for sm_80 and sm_90; no card is needed"
	@echo "make clean       remove caches, site/ and build files (not runs/ and not .venv)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "xdist needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 3; }
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "python -m venv failed; on Debian and Ubuntu it is the package python3-venv."; exit 3; }

# The build backend comes from the pinned list too, so that nothing is built with a newer one.
$(VENV)/.installed-run: constraints.txt pyproject.toml | $(BIN)/python
	@echo "installing xdist and its dependencies (torch is the large one)"
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: constraints.txt pyproject.toml | $(VENV)/.installed-run
	@echo "installing the tools of tests and docs"
	@$(PIP) --no-build-isolation --editable '.[dev,docs,tensorboard,deepspeed,ray,mpi,transformers,peers,volumes]'
	@touch $@

# Real text that every machine has: the sources of the running Python's standard library. A store
# that is there is kept.
store: $(VENV)/.installed-run
	$(BIN)/xdist prepare text \
	  "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
	  data-cache/stdlib.zarr --pattern '*.py'

# The MNI ICBM152 T1 brain with its tissue maps lies in nilearn's wheel; nothing of it is installed.
BRAIN := data-cache/icbm152
WHEEL := nilearn-0.14.1-py3-none-any.whl
$(VENV)/.installed-volumes: constraints.txt pyproject.toml | $(VENV)/.installed-run
	@$(PIP) --no-build-isolation --editable '.[volumes]'
	@touch $@

$(BRAIN)/white.nii.gz: | $(VENV)/.installed-run
	@[ -f $(BRAIN)/$(WHEEL) ] || $(BIN)/python -m pip --disable-pip-version-check --quiet download \
	  --no-deps --only-binary :all: --dest $(BRAIN) nilearn==0.14.1
	$(BIN)/python -m xdist.data.volume_icbm $(BRAIN)/$(WHEEL) $(BRAIN)

brain: $(VENV)/.installed-volumes $(BRAIN)/white.nii.gz
	$(BIN)/xdist prepare volume $(BRAIN)/t1.nii.gz data-cache/icbm152.zarr \
	  --map grey=$(BRAIN)/grey.nii.gz --map white=$(BRAIN)/white.nii.gz --map-scale 255

# With its scans, without them, then both beside the best two thresholds on the held-out slab.
volume: brain
	$(BIN)/xdist certify configs/volume.toml
	$(BIN)/xdist launch local configs/volume.toml
	$(BIN)/xdist launch local configs/volume.toml run.name=volume-without-scans model.options.scan=none
	$(BIN)/python -m xdist.volume runs/volume-judged runs/volume runs/volume-without-scans

quickstart: store
	$(BIN)/xdist certify $(CONFIG)
	$(BIN)/xdist launch local $(CONFIG)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --durations=15

# Debian's packages. Their daemons need not run: the tests start private ones in a folder.
SLURM_PACKAGES := slurm-wlm munge shellcheck
SLURM_PROGRAMS := munged slurmctld slurmd sbatch srun scontrol shellcheck
slurm-deps:
	@PATH="$$PATH:/usr/sbin:/sbin"; missing=""; \
	for program in $(SLURM_PROGRAMS); do \
	  command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	[ -n "$$missing" ] || exit 0; \
	command -v apt-get >/dev/null || { \
	  echo "not installed:$$missing; apt-get is not here: install $(SLURM_PACKAGES) by hand"; exit 3; }; \
	sudo=""; [ "$$(id -u)" = 0 ] || sudo="sudo"; \
	echo "not installed:$$missing; running: $$sudo apt-get install $(SLURM_PACKAGES)"; \
	$$sudo apt-get update -q && $$sudo env DEBIAN_FRONTEND=noninteractive \
	  apt-get install -q -y --no-install-recommends $(SLURM_PACKAGES)

test-slow: $(VENV)/.installed-dev slurm-deps
	$(BIN)/python -m pytest -m "slow and not gpu" --durations=15 --timeout=1500

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --quiet --strict --site-dir site

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict --site-dir site
	@echo "open site/index.html, or: $(BIN)/mkdocs serve"

bench: $(VENV)/.installed-dev store
	$(BIN)/python tests/benchmarks/main.py $(BENCH)

# Nothing is installed: a plain copy of the tree, and the Python that already has torch for this
# card (else that of .venv). GPU_PYTHON names another one.
GPU_PYTHON ?= $(shell $(PYTHON) -c 'import torch' 2>/dev/null || ! [ -x $(BIN)/python ] && \
  echo $(PYTHON) || echo $(BIN)/python)
gpu:
	@PYTHONPATH=.:kernels:launchers $(GPU_PYTHON) tests/gpu/main.py

# GPU holds options, such as GPU="--rows KDA --again".
gpu-parity gpu-linear gpu-attention gpu-memory: gpu-%:
	@PYTHONPATH=.:kernels:launchers $(GPU_PYTHON) tests/gpu/gpu_$*.py $(GPU)

# The table docs/kernels/compiled.md; what it holds already is not compiled again.
ahead: $(VENV)/.installed-dev
	$(BIN)/python -m xdist_kernels.ahead --out docs/kernels

clean:
	rm -rf site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf
