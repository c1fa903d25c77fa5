# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OUT    ?= benchmarks/results/gpu
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: demo test fuzz faults lint types ptx hooks sanitize static bench gpu clean help

demo: $(READY)  ## train and compare the three algorithms on real text
	$(BIN)/wmtp compare --tiny --out runs/demo

# Two processes of two threads on two cores: threads that wait must not spin.
test fuzz faults ptx sanitize: export OMP_WAIT_POLICY := passive
# A hundred processes import the same files: what Python makes of them is kept.
test fuzz faults ptx sanitize: export PYTHONDONTWRITEBYTECODE :=
test: $(READY)  ## the whole suite, doctests included; GPU tests run where there is a GPU
	$(BIN)/python -m pytest -n 2 --dist worksteal

fuzz: $(READY)  ## many times as many generated cases, of logits, labels and caps, against the fp64 truth; others: WMTP_FUZZ_SEED=1 make fuzz
	WMTP_FUZZ_CASES=2000 WMTP_TARGET_CASES=500 WMTP_NUMERICS_CASES=500 WMTP_INTERPRETED_SHARE=1 \
	$(BIN)/python -m pytest $(addprefix tests/test_,fuzz.py targets.py numerics.py metrics.py weightings.py) -n 2

faults: $(READY)  ## sixty runs that are killed, damaged, out of disk at random; others: WMTP_FAULTS_SEED=1 make faults
	WMTP_FAULTS=60 $(BIN)/python -m pytest tests/test_faults.py -n 2

lint: types  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# setup.py maps two folders into the package; mypy finds them where they are installed, through links.
INSTALLED := build/installed/wmtp
types: $(READY)  ## mypy on the package as it is installed
	@mkdir -p $(INSTALLED)
	@ln -sfn $(CURDIR)/wmtp/* $(CURDIR)/benchmarks $(INSTALLED)
	@ln -sfn $(CURDIR)/kernels/gpu $(INSTALLED)/kernels
	$(BIN)/mypy

# Compiled kernels on a machine of NumPy. SHARE=3: a third of the cases.
ON    ?= sm_80 sm_90a
SHARE ?= 1
PTX_TESTS := $(addprefix tests/test_,$(addsuffix .py, kernels kernels_nonfinite kernels_tiers \
	kernels_numerics kernels_rules kernels_weights kernels_phase head_list inplace scale_kernel rows_ce linear \
	linear_autograd loss gradient)) tests/ptx
ptx: $(READY)  ## the kernels' tests on their PTX, executed without a card, with races and bounds watched; SHARE=3: a third; ON=sm_80: for that alone
	@failed=; for on in $(ON); do \
	WMTP_KERNELS_ON=$$on WMTP_PTX_SHARE=$(SHARE) $(BIN)/python -m pytest -n 2 --dist worksteal $(PTX_TESTS) || failed=1; \
	done; [ -z "$$failed" ]

hooks: $(READY)  ## ruff and mypy before every commit of yours (git hooks, by pre-commit)
	$(BIN)/pip install --quiet pre-commit
	$(BIN)/pre-commit install

# Python itself has no sanitizers in it, so their runtime is loaded before it; its leaks are not ours.
sanitize: $(READY)  ## the CPU kernel's tests, on a build with address and undefined-behaviour sanitizers
	$(BIN)/cmake -G Ninja -B build/sanitize -DWMTP_SANITIZE=ON -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/cmake --build build/sanitize
	WMTP_CPU_LIBRARY=$(CURDIR)/build/sanitize/libwmtp_cpu.so ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	$(BIN)/python -m pytest tests/test_cpu*.py tests/test_inplace.py tests/test_rows_ce.py tests/test_rules.py tests/test_metrics.py -k "not compile and not interpreted and not triton"

# Triton's compilers, each alone (no torch) in an environment of a GB.
TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0
STATIC  ?= --summary benchmarks/results/static-gpu.json
JOBS    ?= $(shell nproc)
static: $(TRITONS:%=build/triton-%/.ready)  ## all 17,000 binaries of the kernels, by four versions of Triton for four cards: some four hours of a core; STATIC='--sample 80': so many a version
	@failed=; for version in $(TRITONS); do \
	build/triton-$$version/bin/python -m benchmarks.static_gpu --check --jobs $(JOBS) --known build/triton-$$version/rows.jsonl $(STATIC) || failed=1; \
	done; [ -z "$$failed" ]

build/triton-%/.ready:
	$(PYTHON) -m venv $(@D)
	PIP_CONSTRAINT= $(@D)/bin/pip install --quiet --no-deps triton==$*
	touch $@

bench: $(READY)  ## speed and memory against eager torch, torch.compile and a plain copy
	$(BIN)/wmtp bench

# Nothing is installed where $(PYTHON) brings torch, Triton and pytest: such a machine may have no network.
gpu:  ## all that a CUDA card can settle, in eight minutes; without one, what is predicted
	@[ -e $(READY) ] || $(PYTHON) -c "from importlib.util import find_spec as found; \
	raise SystemExit(not all(map(found, ('torch', 'triton', 'pytest'))))" || $(MAKE) $(READY)
	$$([ -e $(READY) ] && echo $(BIN)/python3 || echo $(PYTHON)) -m benchmarks.gpu --out $(OUT)

# torch first and alone: its pinned build decides what the rest may bring along.
$(READY): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard kernels/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch
	$(BIN)/pip install --quiet -e '.[all]'
	touch $@

help:  ## what is here
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

clean:  ## away with the environment, builds and runs
	rm -rf $(VENV) build *.egg-info wmtp/*.so runs
