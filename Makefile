# What a change needs; CONTRIBUTING.md says when. Each target can be run by itself.
export OMP_NUM_THREADS ?= 1
PYTHON ?= python

.PHONY: quick test lint docs tables sdist

# Some of every folder, under 60 CPU-seconds in all: nothing here trains.
QUICK = tests/test_layout.py tests/test_verdict.py tests/test_objectives.py \
	tests/test_images.py tests/text tests/guards/test_strict_json.py tests/loss/test_rows.py \
	tests/kernels/test_launch.py tests/model/test_load.py tests/samples/test_dreams.py \
	tests/evaluate/test_metrics.py tests/evaluate/suites/test_suite.py tests/evaluate/test_g_eval.py \
	tests/evaluate/test_lmms.py tests/compare tests/report/test_report.py \
	tests/demo/test_world.py tests/benches/test_apply.py tests/docs

quick:
	$(PYTHON) -m pytest -q -m "not slow" $(QUICK)

test: # all tests
	$(PYTHON) -m pytest -q -n 2 --dist loadfile

lint:
	ruff check .
	ruff format --check .
	mypy

docs: # the site, into build/site; dead links fail (with --quiet they would not)
	$(PYTHON) docs/troubleshooting.py
	mkdocs build --strict

tables: # the documents' tables from benches/results
	$(PYTHON) docs/tables.py

sdist:
	$(PYTHON) -m build --sdist --outdir build/sdist .
