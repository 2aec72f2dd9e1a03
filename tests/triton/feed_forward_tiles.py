"""Which tile feed_forward's products take, decided by a test."""

from fastformer.triton_kernels import configs, feed_forward, feed_forward_bwd, gemm

# The most tiles that any kind of product has.
TILES = range(
    max(
        len(tiles)
        for arch in ("sm_80", "sm_90", "gfx942")
        for itemsize in (2, 4)
        for tiles in configs.gemm_tiles(arch, itemsize, 16 // itemsize).values()
    )
)


def use_tile(monkeypatch, tile, parts=1, told=None):
    """Tile number `tile` of those that its kind of product has on the target, or on the one that is told, and
    K in so many parts."""

    def choose(arch, kind, itemsize, align, *_):
        tiles = configs.gemm_tiles(told or arch, itemsize, align)
        of_kind = tiles.get(kind, tiles[""])
        return of_kind[min(tile, len(of_kind) - 1)], parts if kind == "plain" else 1

    for module in (gemm, feed_forward, feed_forward_bwd):
        monkeypatch.setattr(module, "gemm_config", choose)
