# make reproduce: from a bare Python 3.11 to every figure of the mini profile. `make` alone lists the targets.
PYTHON  ?= python3.11
PROFILE ?= mini
CORES   ?= all
# Waiting threads sleep; see notebooks/companion/__init__.py. Here, too, for a kernel that imports torch first.
export OMP_WAIT_POLICY ?= passive
GPUS    ?= $(shell nvidia-smi -L 2>/dev/null | grep -c GPU | sed 's/^0$$/1/')

BIN       := .venv/bin
INSTALLED := .venv/.installed
# They wait for all others; where one of these failed they show what there is.
LAST      := 19_scoreboard 00_start_here
# Outputs and features are whole or absent, so a killed run leaves nothing to unlock; jobs print their own lines.
SNAKEMAKE  = $(BIN)/snakemake --cores "$(CORES)" --resources "gpu=$(GPUS)" --keep-going --rerun-incomplete --nolock --quiet all
SCRATCH   := $(CURDIR)/build/test
# One process a core, of one thread: two such processes do more than one process of two threads. A file stays in one.
TESTS      = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs --numprocesses auto --maxprocesses 8 --dist loadfile
TEST_ENV   = FUNGI_STORE="$(SCRATCH)/store" FUNGI_FIGURES="$(SCRATCH)/figures"

.PHONY: help install reproduce lite paper plan lab site check test lint format normalize refresh gallery lock licences audit clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | awk -F'\t' '{printf "make %-10s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## .venv with the locked versions (4 GB, a few minutes; nothing to do the second time)

$(INSTALLED): pyproject.toml notebooks/pyproject.toml requirements.lock
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "Python 3.11 is needed and $(PYTHON) is none: install it, or name one with PYTHON=/path/to/python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "creating .venv"; "$(PYTHON)" -m venv --clear .venv; }
	@echo "installing requirements.lock into .venv (once; a few minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e . -e notebooks
	@touch $@

reproduce: $(INSTALLED)  ## run every notebook of PROFILE (mini) on CORES (all); figures land in figures/PROFILE
	@$(SNAKEMAKE) --config "profile=$(PROFILE)" || { \
		for last in $(LAST); do test -d "runs/$(PROFILE)" && $(BIN)/python -m companion.run $$last --profile "$(PROFILE)"; done; \
		echo "failed; where no line above says why, this does: $(BIN)/snakemake -n --config profile=$(PROFILE)" >&2; exit 1; }
	@echo "done: the figures are in $${FUNGI_FIGURES:-figures}/$(PROFILE), the executed notebooks in runs/$(PROFILE)"

lite:  ## the lite profile: make lite DATA=folder of the data sets
	@test -d "$(DATA)" || { echo "make lite DATA=folder: '$(DATA)' is no folder"; exit 1; }
	@FUNGI_DATA="$$(cd "$(DATA)" && pwd)" $(MAKE) --no-print-directory reproduce PROFILE=lite
	@$(MAKE) --no-print-directory gallery

paper:  ## the paper profile: a GPU machine; data and weights in FUNGI_DATA or data/downloads
	@$(MAKE) --no-print-directory reproduce PROFILE=paper

plan: $(INSTALLED)  ## what `make reproduce` would run for PROFILE (mini); and jobs and rows of the whole profile
	@$(BIN)/snakemake --cores "$(CORES)" -n --nolock --quiet rules --config "profile=$(PROFILE)"
	@echo; echo "the whole of it, on this machine or not:"; $(BIN)/python -m companion.plan "$(PROFILE)"

# The project is the root, else links to its other folders lead nowhere. notebooks/jupyter holds the settings: comms in the
# kernel's main thread, where the stop button reaches what a widget started; nothing is saved unasked, so reading leaves
# the checkout clean; and messages of more than 10 MB, since photographs chosen in the browser travel in one.
lab: $(INSTALLED)  ## open JupyterLab at the first notebook
	@$(BIN)/jupyter trust notebooks/*.ipynb >/dev/null
	JUPYTER_CONFIG_PATH="$(CURDIR)/notebooks/jupyter" $(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" notebooks/00_start_here.ipynb

site: $(INSTALLED)  ## the executed notebooks, figures/lite and the scoreboard as pages: build/site/index.html
	@$(BIN)/python -m companion.site

gallery: $(INSTALLED)  ## figures/lite/README.md: the claims with their verdicts, the figures with links
	@$(BIN)/python -m companion.paper

lint: $(INSTALLED)  ## style of code and notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## lay out the code as `make lint` wants it
	$(BIN)/ruff format .

check: $(INSTALLED) lint  ## while working: style, and the tests that answer in under five minutes
	$(TESTS) -m "not contract and not batch" tests

# Features are extracted once, into build/test, for the contract and nbval alike; committed figures stay as they are.
test: $(INSTALLED) lint  ## everything that CI runs
	@rm -rf "$(SCRATCH)"
	$(TEST_ENV) $(TESTS) tests
	$(TEST_ENV) $(TESTS) --nbval-lax notebooks

NBCONVERT := ../$(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --inplace
normalize: $(INSTALLED)  ## strip times and versions from notebooks saved in JupyterLab (before a commit)
	cd notebooks && $(NBCONVERT) --coalesce-streams *.ipynb
	$(BIN)/nbstripout --keep-output --keep-count --keep-id notebooks/*.ipynb \
		--extra-keys "$$($(BIN)/python -c 'from companion import run; print(*run.STRIPPED)')"

refresh: $(INSTALLED)  ## execute all notebooks in place with their defaults, then normalize
	cd notebooks && $(NBCONVERT) --execute *.ipynb
	@$(MAKE) --no-print-directory normalize

lock: $(INSTALLED)  ## write requirements.lock from the present .venv
	@$(BIN)/python -m pip freeze -q --exclude-editable > build.lock
	@{ echo "# What the Makefile installs, with CPython 3.11 from PyPI. Written by 'make lock' from a .venv that passed the tests."; \
	   sed -E '/^(nvidia-|cuda-|triton=)/ s/$$/ ; sys_platform == "linux"/' build.lock; } > requirements.lock && rm build.lock

licences:  ## write data/LICENCES.md from the tables of the code and the installed packages
	$(BIN)/python data/licences.py

audit:  ## known vulnerabilities of the locked packages; asks PyPI, needs a network
	"$(PYTHON)" -m venv build/audit && build/audit/bin/python -m pip install -q --disable-pip-version-check pip-audit
	build/audit/bin/pip-audit -r requirements.lock --disable-pip --no-deps --strict

clean:  ## remove what runs and tests made (features too); the figures and .venv stay
	rm -rf runs build data/store .snakemake .pytest_cache .ruff_cache .hypothesis *.egg-info notebooks/*.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
