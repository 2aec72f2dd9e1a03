"""A pytest plugin (`-p tests.triton.contract_plugin`): tests/ops judges the Triton backend alone."""

from tests.ops import judging
from tests.triton import interpreter_mends

judging.BACKENDS = ("triton",)
interpreter_mends.install()
