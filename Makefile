# One command each. Needs python3 (3.11 or newer for the tested edition), git and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --no-compile -c constraints.txt

# A stamp says which set-up .venv has: "demo" is the engine, "full" adds the book and the tests.
DEMO := $(VENV)/.stamp-demo
FULL := $(VENV)/.stamp-full

.DEFAULT_GOAL := help
.PHONY: help demo check test real clients soak gpu book pdf figures ladder notebooks tangle format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(DEMO)  ## set up the engine and let the bundled model write a story
	@OMP_WAIT_POLICY=passive $(BIN)/nanovllm generate "Once upon a time"

check: $(FULL)  ## after a change: lint, tangle, types, the quick tests of the last stage
	@$(BIN)/python tests/run.py --quick

test: $(FULL)  ## run everything: lint, tangle, tests, book build, every notebook
	@$(BIN)/python tests/run.py

real: $(FULL)  ## real weights (93 MB are fetched): compared with transformers, asked, and timed
	@$(BIN)/python tests/real.py

clients: $(FULL)  ## try the server with LiteLLM, LangChain, lm-eval and GuideLLM (installs them)
	@$(PIP) -e '.[clients]'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/clients

soak: $(FULL)  ## the long runs: 200,000 random operations, 2,000 requests in a small pool
	@NANOVLLM_OPERATIONS=200000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q \
	  tests/conformance -k "random_operations or random_pipelines"
	@NANOVLLM_OPERATIONS=200000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 \
	  tests/conformance/from_stage_5 -k "not random_operations"
	@$(BIN)/python tests/bench_scheduler.py

gpu: $(FULL)  ## on a GPU: kernels, the conformance suite, 20,000 requests through one engine
	@$(BIN)/python -m pytest -q -n 4 tests/test_kernels.py
	@NANOVLLM_DEVICE=cuda $(BIN)/python -m pytest -q -n 4 -m "not gpu" tests/conformance
	@NANOVLLM_DEVICE=cuda NANOVLLM_REQUESTS=20000 $(BIN)/python -m pytest -q -m gpu tests/conformance

book: $(FULL)  ## build the book from the stored outputs
	@$(BIN)/jupyter-book build . -W --keep-going -q

pdf: book  ## print the book into one PDF (needs Chromium)
	@$(BIN)/python book/pdf.py

figures: $(FULL)  ## draw every diagram and ladder anew, from code and stored numbers
	@$(BIN)/python book/figures/diagrams.py
	@$(BIN)/python book/measure/ladder.py --plot-only
	@$(BIN)/python book/measure/ladder.py --plot-only --out book/measure/ladder_standard.json \
	  --figure book/figures/ladder_standard.svg

ladder: $(FULL)  ## measure every stage on one workload
	@$(BIN)/python book/measure/ladder.py

notebooks: $(FULL)  ## execute every notebook afresh and store the outputs
	@$(BIN)/python book/measure/execute.py

tangle: $(FULL)  ## rewrite nanovllm/ from the chapters
	@$(BIN)/python chapters/tangle.py

format: $(FULL)  ## format code and notebooks, fix what ruff can fix
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/ruff format -q .

clean:  ## remove the built book and caches (.venv stays)
	rm -rf _build build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  f"the tested edition needs Python 3.11 or newer, and $(PYTHON) is {v.major}.{v.minor}: " \
	  "try make PYTHON=python3.12, or install the package by hand with pip install -e .")'
	@$(PYTHON) -m venv $(VENV)

$(DEMO): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "setting up $(VENV) for the engine (about a minute)"
	@$(PIP) torch -e .
	@touch $@

$(FULL): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "setting up $(VENV) for the engine, the book and the tests (about two minutes)"
	@$(PIP) torch -e '.[book,test]'
	@touch $(DEMO) $@
