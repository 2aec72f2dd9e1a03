"""A pytest plugin (`-p tests.triton.contract_plugin`): tests/ops judges the Triton backend alone."""

from tests.ops import judging

judging.BACKENDS = ("triton",)
