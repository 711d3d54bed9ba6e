# The project's commands. `make` alone prints them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv repro test lint site audit ui lock clean

PYTHON ?= python3
TORCH ?= gpu
PORT ?= 5000
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
	@echo "make TARGET [PYTHON=python3.11] [TORCH=cpu]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# setuptools warns of each folder of the project template that is no package, 50 lines each: hidden.
# .venv/stamp is written last. Line 1: the interpreter, the torch and the folder, line 2: the requirements. No stamp (an
# interrupted set-up) or another line 1 (another Python, a moved checkout): from scratch. Another line 2: updated in place.
venv: ## set up .venv where it is missing or stale (every other target does it); TORCH=cpu: half the size, for no GPU
	@test -f "requirements-$(TORCH).lock" || { echo "set-up: TORCH=$(TORCH), expected gpu or cpu" >&2; exit 1; }; \
	command -v "$(PYTHON)" >/dev/null || { \
		echo "set-up: no '$(PYTHON)' found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; }; \
	python="$$("$(PYTHON)" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')"; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "set-up: $$python is $$("$$python" -V 2>&1), 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; }; \
	interpreter="$$("$$python" -c 'import sys; print(*sys.version_info[:3], sep=".")') $(TORCH) $(VENV)"; \
	requirements="$$("$$python" -c 'import hashlib, pathlib; print(hashlib.sha256(b"".join(pathlib.Path(p).read_bytes() for p in ("requirements.lock", "requirements-dev.lock", "requirements-$(TORCH).lock", "pyproject.toml"))).hexdigest())')"; \
	have=""; if [ -x "$(BIN)/python" ] && [ -f "$(VENV)/stamp" ]; then have="$$(cat "$(VENV)/stamp")"; fi; \
	if [ "$$have" = "$$interpreter"$$'\n'"$$requirements" ]; then exit 0; fi; \
	rm -f "$(VENV)/stamp"; \
	if [ "$${have%%$$'\n'*}" != "$$interpreter" ]; then \
		"$$python" -c 'import ensurepip, venv' 2>/dev/null || { \
			echo "set-up: $$python has no venv module: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }; \
		echo "set-up: new virtual environment .venv ($$("$$python" -V))"; \
		"$$python" -m venv --clear "$(VENV)"; \
	fi; \
	echo "set-up: packages of requirements*.lock (a first time takes minutes and some 7 GB of disk; TORCH=cpu: half of it)"; \
	"$(BIN)/python" -m pip install --quiet --no-input --no-deps --requirement "requirements-$(TORCH).lock"; \
	"$(BIN)/python" -m pip install --quiet --no-input --no-deps --require-hashes \
		--requirement requirements.lock --requirement requirements-dev.lock; \
	echo "set-up: emadapt itself"; \
	PYTHONWARNINGS=ignore "$(BIN)/python" -m pip install --quiet --no-input --no-deps --no-build-isolation --editable .; \
	printf '%s\n%s\n' "$$interpreter" "$$requirements" >"$(VENV)/stamp.new"; \
	mv "$(VENV)/stamp.new" "$(VENV)/stamp"; \
	echo "set-up: done"

# DVC works in a git checkout alone, and every run is to name its commit.
repro: venv ## set up, get the data, run the study of params.yaml
	@git rev-parse --git-dir >/dev/null || { \
		echo "repro: no git checkout that git accepts (above is why). Clone the repository; of an unpacked ZIP make one:" >&2; \
		echo "       git init && git add . && git commit -m 'from a ZIP'" >&2; exit 1; }
	@if [ ! -e data ]; then echo "data: dvc pull"; $(IN_VENV) dvc pull --quiet data.dvc; fi
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

ui: venv ## the runs in MLflow on http://127.0.0.1:5000 (or PORT=5001), until Ctrl-C
	@"$(BIN)/python" -c 'import socket; socket.create_server(("127.0.0.1", $(PORT)))' 2>/dev/null || { \
		echo "ui: port $(PORT) is taken by another program. Choose another: make ui PORT=$$(($(PORT) + 1))" >&2; exit 1; }
	@echo "open http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning"
	$(IN_VENV) mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port $(PORT) --workers 1

lock: ## resolve pyproject.toml into requirements*.lock; versions that fit stay (remove the files for the newest)
	@tmp="$$(mktemp -d)"; trap 'rm -rf "$$tmp"' EXIT; \
	"$(PYTHON)" -m venv "$$tmp"; \
	"$$tmp/bin/python" -m pip install --quiet --no-input uv; \
	PATH="$$tmp/bin:$$PATH" "$$tmp/bin/python" .ci/lock

clean: ## remove build/, what scratch/ has that is made again, tool caches; keeps sweeps, MLflow's runs, data/, reports/, .venv
	rm -rf build scratch/{downloads,hashes.json,keys,models,repro,tokens,units,weights} .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
