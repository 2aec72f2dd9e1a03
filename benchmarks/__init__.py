"""What fastformer buys, measured: `python -m benchmarks`.

Each `bench_*.py` holds the cases of one operator or one model. pytest-benchmark times them in
alternating passes over the contenders (see conftest.py), results.py pools the passes, report.py and
plots.py draw what was found.
"""
