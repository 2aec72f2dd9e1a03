"""Triton decides when a kernel is defined whether it will be interpreted, so these tests need a process of
their own: ../test_interpreter.py starts one. Anywhere else there is nothing to collect here."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.triton import interpreter_mends

    interpreter_mends.install()
