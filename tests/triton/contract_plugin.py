"""A pytest plugin (`-p tests.triton.contract_plugin`): tests/ops judges the Triton backend alone."""

from tests.ops import judging
from tests.triton import bfloat16_dots

judging.BACKENDS = ("triton",)
bfloat16_dots.install()
