# The project's commands. `make` alone prints them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv repro test lint site audit ui lock clean

PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
IN_VENV := PATH="$(BIN):$$PATH"

export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false
export NO_ALBUMENTATIONS_UPDATE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## print this list
	@echo "make TARGET [PYTHON=python3.11]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# .venv/stamp is written last. Line 1: the interpreter and the folder, line 2: the requirements. No stamp (an
# interrupted set-up) or another line 1 (another Python, a moved checkout): from scratch. Another line 2: updated in place.
venv: ## set up .venv where it is missing or stale (every other target does it by itself)
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "set-up: no '$(PYTHON)' found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; }; \
	python="$$("$(PYTHON)" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')"; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "set-up: $$python is $$("$$python" -V 2>&1), 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; }; \
	interpreter="$$("$$python" -c 'import sys; print(*sys.version_info[:3], sep=".")') $(VENV)"; \
	requirements="$$("$$python" -c 'import hashlib, pathlib; print(hashlib.sha256(b"".join(pathlib.Path(p).read_bytes() for p in ("requirements.lock", "pyproject.toml"))).hexdigest())')"; \
	have=""; if [ -x "$(BIN)/python" ] && [ -f "$(VENV)/stamp" ]; then have="$$(cat "$(VENV)/stamp")"; fi; \
	if [ "$$have" = "$$interpreter"$$'\n'"$$requirements" ]; then exit 0; fi; \
	rm -f "$(VENV)/stamp"; \
	if [ "$${have%%$$'\n'*}" != "$$interpreter" ]; then \
		"$$python" -c 'import ensurepip, venv' 2>/dev/null || { \
			echo "set-up: $$python has no venv module: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }; \
		echo "set-up: new virtual environment .venv ($$("$$python" -V))"; \
		"$$python" -m venv --clear "$(VENV)"; \
	fi; \
	echo "set-up: packages of requirements.lock (a first time takes minutes and about 7 GB of disk)"; \
	"$(BIN)/python" -m pip install --quiet --no-input --no-deps --requirement requirements.lock; \
	echo "set-up: emadapt itself"; \
	"$(BIN)/python" -m pip install --quiet --no-input --no-deps --no-build-isolation --editable .; \
	printf '%s\n%s\n' "$$interpreter" "$$requirements" >"$(VENV)/stamp.new"; \
	mv "$(VENV)/stamp.new" "$(VENV)/stamp"; \
	echo "set-up: done"

# `dvc repro` would silently take edited data as the new version of it, so a difference stops here.
repro: venv ## set up, get the data, run the study of params.yaml
	@if [ ! -e data ]; then echo "data: dvc pull"; $(IN_VENV) dvc pull --quiet data.dvc; fi
	@$(IN_VENV) dvc status --quiet data.dvc || { \
		echo "data: data/ is not what data.dvc records. Keep the change: $(BIN)/dvc add data" >&2; \
		echo "      Undo it: $(BIN)/dvc checkout --force data.dvc" >&2; exit 1; }
	$(IN_VENV) emadapt repro --jobs 2 # two stages at once: half of a stage is start-up, which uses one core

test: venv ## set up, run the fast tests
	$(IN_VENV) python -m pytest -q --numprocesses 2 --dist loadfile

lint: venv ## ruff, import-linter, mypy, hadolint
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) lint-imports
	$(IN_VENV) mypy
	$(IN_VENV) hadolint Dockerfile

audit: venv ## known vulnerabilities, licences, bill of materials of requirements.lock, in build/audit
	$(IN_VENV) python .ci/audit

site: venv ## the documents as a site, build/site/index.html; a link to nothing is an error
	NO_MKDOCS_2_WARNING=1 $(IN_VENV) mkdocs build --quiet --strict

ui: venv ## the runs in MLflow on http://127.0.0.1:5000, until Ctrl-C
	@echo "open http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"
	$(IN_VENV) mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000 --workers 1

# A fresh environment from the ranges of pyproject.toml, frozen. Packages that only Linux has get a marker.
lock: ## resolve pyproject.toml anew into requirements.lock
	@tmp="$$(mktemp -d)"; trap 'rm -rf "$$tmp"' EXIT; \
	"$(PYTHON)" -m venv "$$tmp"; \
	"$$tmp/bin/python" -m pip install --quiet --no-input --upgrade pip setuptools; \
	"$$tmp/bin/python" -m pip install --quiet --no-input --editable '.[dev,embedded,postgres,dashboard,cluster,export,docs]'; \
	"$$tmp/bin/python" -m pip check; \
	{ \
		echo "# Made by make lock on $$("$(PYTHON)" -V), $$(uname -sm): pyproject.toml with the extras dev, embedded, postgres, dashboard, cluster, export, docs."; \
		"$$tmp/bin/python" -m pip freeze --all --exclude emadapt --exclude pip \
			| sed -E 's/^((nvidia|cuda)-[^ ]+|triton==[^ ]+)$$/\1 ; sys_platform == "linux"/'; \
	} >requirements.lock.new; \
	mv requirements.lock.new requirements.lock

clean: ## remove build/, scratch/ and tool caches; keeps .venv, data/, the DVC cache, reports/ and MLflow's runs
	rm -rf build scratch .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
