# HTLab's doors. A bare machine needs python3 (3.11 or later) and make; the first door builds .venv from the lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
IN := . $(BIN)/activate &&
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME

help: ## these lines
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: $(READY) ## the main job on simulated ultrasound; prints the path of the report
	@$(IN) htlab demo

test: $(READY) ## every check: export and clean leave no diff, pages run, pytest (ARGS="-k name" for some)
	@$(IN) python -m pytest $(ARGS)

bench: $(READY) ## what steps, epochs and evaluations cost against plain routes (BENCH="--only step,cases" for some)
	@$(IN) python benchmarks/speed.py $(BENCH)

# the folder is nbs, so that a reader can step from a lesson to the page behind it; Jupyter's random token guards the door
lab: $(READY) ## JupyterLab on the lessons (LABFLAGS=--no-browser over ssh)
	@$(IN) jupyter lab --ip 127.0.0.1 --notebook-dir nbs --LabApp.default_url=/lab/tree/lessons $(if $(filter 0,$(shell id -u)),--allow-root) $(LABFLAGS)

lock: $(READY) ## settings.ini -> requirements.lock for every system (LOCKFLAGS=--upgrade for newer versions)
	$(BIN)/uv pip compile --quiet --refresh-package htlab --universal --python-version 3.11 --no-header setup.py --extra dev -o requirements.lock $(LOCKFLAGS)

clean: ## forget .venv and caches; runs/ stays
	rm -rf $(VENV) _docs _proc build .cache .pytest_cache .hypothesis *.egg-info
	find htlab tests nbs -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

.PHONY: help demo test bench lab lock clean

# Written last, so a half-built .venv has none; it holds the folder's name, because a moved .venv runs no more.
ifneq ($(shell $(BIN)/python -c pass 2>/dev/null && cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

# nbdev_install_hooks would write to ~/.jupyter for all projects and needs an active .venv: the same three hooks, here alone.
$(READY): requirements.lock settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "HTLab needs Python 3.11 or later, and $(PYTHON) is: $$($(PYTHON) -V 2>&1 | tail -n 1). Install one, or name it: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) lacks the venv module. On Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	@echo "Building .venv from requirements.lock: once, some minutes (on Linux 6 GB, most of it PyTorch's GPU libraries) ..."
	@rm -f $(READY) && $(PYTHON) -m venv --clear $(VENV)
	@{ $(BIN)/python -m pip install -q --disable-pip-version-check uv && $(BIN)/uv pip sync $(if $(CI),-q) --python $(BIN)/python requirements.lock; } || $(BIN)/python -m pip install --no-deps -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@mkdir -p $(VENV)/etc/jupyter && $(BIN)/python -c 'from nbdev.clean import _pre_save_hook_src as hook; print(hook)' > $(VENV)/etc/jupyter/jupyter_server_config.py
	@test ! -e .git || { hook="$$(git rev-parse --git-common-dir)/hooks/post-merge" && mkdir -p "$${hook%/*}" && { test -e "$$hook" || printf '#!/bin/sh\n$(BIN)/nbdev_trust\n' > "$$hook"; } && chmod +x "$$hook" && git config merge.nbdev-merge.driver '$(BIN)/nbdev_merge %O %A %B %P'; } || echo "(no git hooks: git is missing or refuses this folder)"
	@echo "$(CURDIR)" > $(READY)
