# `make demo` and `make test` are each the only command needed on a fresh machine; both use .venv in this folder.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python
# Where the environment forbids files of bytecode, every process would compile torch anew, for seconds.
export PYTHONDONTWRITEBYTECODE :=
DEMO := runs/demo
DIGITS := -d digits -a resnet --depth 20
TRAIN := $(RUN) cifar.py $(DIGITS) --wd 0 --epochs 14 --schedule 9 12 --overwrite
PRUNE := $(RUN) cifar_prune_iterative.py --percent 0.5 0.75 0.9 0.95 --overwrite

.PHONY: demo test test-oldest fuzz kills bench clean

# The whole pipeline on real handwritten digits: train, prune, check, energy, deploy.
demo: .venv/installed
	$(TRAIN) --save_dir $(DEMO)/none
	$(TRAIN) --halo --xi 2e-3 --psi 2e-3 --save_dir $(DEMO)/halo
	$(PRUNE) --resume $(DEMO)/none/final.pth.tar --save_dir $(DEMO)/none/pruned
	$(PRUNE) --resume $(DEMO)/halo/final.pth.tar --save_dir $(DEMO)/halo/pruned
	$(RUN) check_params.py --checkpoint $(DEMO)/halo/pruned/pruned_0.95.pth.tar \
	  --compact $(DEMO)/halo_0.95.halo --plot $(DEMO)/layers.png --overwrite
	$(RUN) compute_energy.py --checkpoint $(DEMO)/none/final.pth.tar $(DEMO)/halo/final.pth.tar \
	  --labels none HALO --layers conv1 layer1.2.conv2 layer2.2.conv2 layer3.0.conv2 layer3.1.conv2 layer3.2.conv2 \
	  --save $(DEMO)/energy --overwrite
	@echo
	@echo "Figures in $(DEMO) and its folders. Top-1 (%) on the test digits, dense and with this fraction of the"
	@echo "convolution weights removed:"
	@$(RUN) compare_pruning.py $(DEMO)/none/pruned/prune.json $(DEMO)/halo/pruned/prune.json \
	  --labels "no penalty" HALO --save $(DEMO)/accuracy_vs_sparsity.png --sentence --overwrite
	@echo
	$(RUN) deploy.py --checkpoint $(DEMO)/halo/pruned/pruned_0.95.pth.tar --save $(DEMO)/small --batch 1 64 \
	  --no_compile --overwrite

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 3 --dist loadfile

# The same tests with the oldest versions that requirements.txt allows, in an environment of their own.
test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 3 --dist loadfile

# Ten minutes of files that were changed at random, and a hundred kills; both state their counts (docs/robustness.md).
fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(RUN) tests/fuzz.py --minutes 10

kills: .venv/installed
	OMP_NUM_THREADS=1 $(RUN) tests/kill_often.py --kills 100

# Speed and memory, as tables; run it with nothing else on the machine.
bench: .venv/installed
	$(RUN) benchmarks/run.py
	$(RUN) benchmarks/sparse.py --network ResNet-20 --batch 1 64 --engines "torch eager" sparse

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --requirement requirements-dev.txt
	@touch $@

.venv-oldest/installed: requirements.txt requirements-dev.txt requirements-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --no-compile --requirement requirements-dev.txt --constraint requirements-oldest.txt
	@touch $@

clean:
	rm -rf .venv .venv-oldest $(DEMO) .pytest_cache .ruff_cache  # not your own runs
