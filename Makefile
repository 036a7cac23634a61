# `make demo` and `make test` are each the only command needed on a fresh machine; both use .venv in this folder.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/installed
	$(BIN)/python cifar.py -d digits -a resnet --depth 20 --halo --xi 1e-3 --psi 1e-3 --wd 0 \
	  --epochs 10 --schedule 6 8 --save_dir runs/demo --overwrite
	@echo "The figures: runs/demo/curves.png runs/demo/regularization.png"

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache
