.DEFAULT_GOAL := help
.PHONY: help install demo check test parity cluster models test-all clean

VENV := .venv
DEVICE ?= cpu

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

install:  ## make .venv with everything locked (DEVICE=gpu for CUDA); quick when nothing changed
	@docker/install.sh $(VENV) $(DEVICE)

demo: install  ## SFT, reward model, PPO and GRPO on this machine, end to end (runs/demo)
	$(VENV)/bin/quatuor demo

check: install  ## lint, types and the tests without engines (under a minute)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest -n 2 --dist loadfile -m "not engines and not cluster and not reports and not models and not slow"

test: check  ## check, then reported failures and the tests with the real engines (under 25 minutes, no root)
	$(VENV)/bin/pytest -n 2 --dist loadfile -m "reports and not engines"
	$(VENV)/bin/pytest -m "engines and not models" --timeout 600 --durations 25

parity: install  ## the same updates through TRL's trainers and through ours, compared (fetches TRL into .venv-trl)
	$(VENV)/bin/python benchmarks/parity_trl.py

cluster: install  ## two nodes, job submission and Slurm, for real (as root; installs what it needs)
	$(VENV)/bin/pytest -m cluster --timeout 900 --durations 12

models: install  ## families of models, adapters, and the tutorial's model (fetches 93 MB)
	$(VENV)/bin/pytest -m "models or slow" --timeout 300 --durations 12

test-all: test parity cluster models  ## everything; what CI runs

clean:  ## remove .venv and all caches; runs/ stays
	rm -rf $(VENV) .venv-trl build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
