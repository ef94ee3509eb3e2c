# What a change needs; CONTRIBUTING.md says when. Each target can be run by itself.
export OMP_NUM_THREADS ?= 1
PYTHON ?= python

.PHONY: quick test lint docs tables sdist

quick: # tests of every folder without training, under 60 CPU-seconds in all
	$(PYTHON) -m pytest -q -m quick

test: # all tests
	$(PYTHON) -m pytest -q -n 2 --dist loadfile

lint:
	ruff check .
	ruff format --check .
	mypy

docs: # the site, into build/site; dead links fail
	$(PYTHON) docs/troubleshooting.py
	mkdocs build --strict --quiet

tables: # the documents' tables from benches/results
	$(PYTHON) docs/tables.py

sdist:
	$(PYTHON) -m build --sdist --outdir build/sdist .
