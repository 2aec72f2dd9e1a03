"""What an installed fastformer must do, run by a plain Python outside the repository: no pytest, only torch.

python smoke.py [--pure]      --pure: the package was installed without its extension
"""

import importlib.util
import json
import subprocess
import sys

import torch
import torch.nn.functional as F

import fastformer


def check_operator(name, ours, theirs, *inputs):
    """Values and gradients against torch's own composition, on the backend that users get."""
    results = []
    for function in (ours, theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4, msg=lambda text: f"{name}: {text}")


def check_operators():
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 48), torch.randn(2, 5, 48)
    weight, bias = torch.randn(48), torch.randn(48)
    check_operator(
        "layer_norm",
        lambda x, w, b: fastformer.layer_norm(x, (48,), w, b),
        lambda x, w, b: F.layer_norm(x, (48,), w, b),
        *(x, weight, bias),
    )
    check_operator(
        "add_norm",
        lambda x, r, w, b: fastformer.add_norm(x, r, w, b)[0],
        lambda x, r, w, b: F.layer_norm(x + r, (48,), w, b),
        *(x, residual, weight, bias),
    )
    query, key, value = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 11, 16), torch.randn(2, 4, 11, 16)
    check_operator("attention", fastformer.attention, F.scaled_dot_product_attention, query, key, value)
    w1, b1, w2, b2 = torch.randn(96, 48) / 7, torch.randn(96), torch.randn(48, 96) / 10, torch.randn(48)
    check_operator(
        "feed_forward",
        fastformer.feed_forward,
        lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
        *(x, w1, b1, w2, b2),
    )


def check_info(pure):
    command = [sys.executable, *(["-S"] if sys.flags.no_site else []), "-m", "fastformer", "info", "--json"]
    facts = json.loads(subprocess.check_output(command, text=True))
    assert facts["backends"]["reference"] == "ready", facts["backends"]
    if not pure:
        assert facts["backends"]["cpu"] == "ready", facts["backends"]
    return facts


def main():
    pure = "--pure" in sys.argv
    assert (importlib.util.find_spec("fastformer._C") is None) == pure, (
        "wanted the extension exactly if not --pure"
    )
    assert importlib.util.find_spec("fastformer.triton_kernels") is not None
    check_operators()
    facts = check_info(pure)
    print("smoke test passed:", json.dumps({"torch": torch.__version__, "backends": facts["backends"]}))


if __name__ == "__main__":
    main()
