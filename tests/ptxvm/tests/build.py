"""The kernels that the emulator's own tests run: CUDA sources of this folder, and Triton functions."""

from pathlib import Path

from tests import ptxvm
from tests.ptxvm.nvcc import compile_module

HERE = Path(__file__).parent / "cuda"


def nvcc(source, arch="80", *defines):
    """Module from tests/cuda/<source>."""
    return compile_module(HERE / source, arch, *(f"-D{define}" for define in defines))


def triton_kernel(fn, target, constexprs, num_warps=4, num_stages=3, **types):
    """Compile a @triton.jit function offline for sm_<target>; pointer and `:16` types are 16-divisible."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = fn.arg_names
    signature = {n: "constexpr" if n in constexprs else types[n].split(":")[0] for n in names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n in types and (types[n][0] == "*" or ":16" in types[n])
    }
    src = ASTSource(fn, signature, constexprs, attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return ptxvm.from_triton(triton.compile(src, target=GPUTarget("cuda", target, 32), options=options))
