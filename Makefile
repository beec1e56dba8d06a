# make setup | demo | test | test-fast | test-tl4 | bench | check | clean
#
# PYTHON picks the interpreter (3.11 or newer), ARGS is handed to pytest: make test ARGS="-k patch -x"

PYTHON ?= python3
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# -qq hides chatter and warnings about package indexes; errors still show.
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# Models here are tiny: a second process uses the second core, which torch's own threads would not. One file is one piece
# of work, so that no fixture is made twice.
WORKERS ?= 2
TEST   := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
TORCH  := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: setup demo test test-fast test-tl4 bench check clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

# The stamp is touched last: an interrupted set-up is taken up again, a finished one is not repeated until the
# dependencies change. The package is installed in place, so edits to the code need no set-up.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "subspace-probe needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "[1/3] creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@# PyTorch comes first and alone: a CPU build that pip can already see then satisfies every later requirement,
	@# and nobody downloads gigabytes of CUDA libraries by way of a dependency.
	@echo "[2/3] installing $(TORCH)"
	@$(PIP) $(TORCH)
	@echo "[3/3] installing subspace-probe and its dependencies (a few minutes, once)"
	@$(PIP) -e ".[dev]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/subspace-probe demo --out demo-report
	@echo "report: $(CURDIR)/demo-report/report.html"

test: $(STAMP)
	@$(TEST) $(ARGS)

test-fast: $(STAMP)
	@$(TEST) -m "not slow" $(ARGS)

# The transformer_lens backend once more, on TransformerLens 4. sae-lens needs 3, so that is an environment of its own.
VENV4  := .venv-tl4
STAMP4 := $(VENV4)/.installed
PIP4   := $(VENV4)/bin/python -m pip install -qq --disable-pip-version-check -c $(VENV4)/constraints.txt
define WITHOUT_TL3
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
tools = [need for need in project["optional-dependencies"]["dev"] if need.startswith(("pytest", "beartype", "hypothesis"))]
print(*(need for need in project["dependencies"] + tools if not need.startswith(("transformer-lens", "sae-lens"))), sep="\n")
endef
export WITHOUT_TL3

$(STAMP4): pyproject.toml constraints.txt
	@test -x $(VENV4)/bin/python || { echo "[1/3] creating $(VENV4)"; $(PYTHON) -m venv $(VENV4); }
	@grep -v -e '^transformer-lens==' -e '^sae-lens==' constraints.txt > $(VENV4)/constraints.txt
	@$(VENV4)/bin/python -c "$$WITHOUT_TL3" > $(VENV4)/requirements.txt
	@echo "[2/3] installing $(TORCH)"
	@$(PIP4) $(TORCH)
	@echo "[3/3] installing transformer-lens 4 and the other dependencies (a few minutes, once)"
	@$(PIP4) -r $(VENV4)/requirements.txt "transformer-lens>=4,<5"
	@$(PIP4) --no-deps -e .
	@touch $@

test-tl4: $(STAMP4)
	@$(VENV4)/bin/python -m pytest -k "test_lens or transformer_lens" tests/models/test_lens.py tests/contracts $(ARGS)

# Timings beside other libraries, which go into a folder of their own: they are no dependencies, and what they ask for
# would replace ours. One thread unless OMP_NUM_THREADS says otherwise; ARGS is handed to each: make bench ARGS="--rounds 9"
SIDE := .bench
$(SIDE)/.installed: | $(STAMP)
	@echo "installing what is compared with into $(SIDE)"
	@mkdir -p $(SIDE) && echo '*' > $(SIDE)/.gitignore
	@$(PIP) --no-deps --target $(SIDE) pyvene==0.1.8 steering-vectors==0.12.2 repeng==0.4.0 gguf \
	    matplotlib seaborn contourpy cycler fonttools kiwisolver pyparsing pillow \
	    && touch $@ || echo "some could not be installed; their rows will say so"

bench: $(STAMP) $(SIDE)/.installed
	@for name in capture generation covariance das large; do $(BIN)/python -m tests.benchmarks.$$name $(ARGS) || exit 1; done

check: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/python -m pytest -q tests/test_architecture.py

# Leaves $(VENV) alone: it takes minutes to make. Remove it by hand to start from nothing.
clean:
	@rm -rf demo-report build dist .pytest_cache .ruff_cache .hypothesis
	@find subspace_probe tests -name __pycache__ -type d -prune -exec rm -rf {} +
