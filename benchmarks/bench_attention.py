"""Attention, forward and with its backward, by what is masked or added, from 32 keys to 4096."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastformer
from benchmarks import dropout
from benchmarks.case import Case, Grid, Rivals, by_the_rule, forward, forward_and_backward, serving

OPERATORS = ("attention", "attention_training")
KINDS = ("full", "causal", "masked", "padded", "dropout", "bias")
DROPOUT = 0.1


def cases(grid: Grid) -> list[Case]:
    return [
        _case(operator, f"{kind} {label}", kind, shape, dtype, grid.device)
        for operator in OPERATORS
        for label, shape, kinds in _shapes(grid, operator)
        for kind in kinds
        for dtype in grid.dtypes
    ]


def _shapes(grid: Grid, operator: str) -> list[tuple[str, tuple[int, int, int, int], tuple[str, ...]]]:
    """Label, (B, H, N, D), and the kinds measured there."""
    batch = lambda count: grid.scaled(count, on_cuda=16)
    minilm = ("minilm", (batch(16), 12, 128, 32))
    bert_base = ("bert-base", (batch(4), 12, 512, 64))
    long = ("long", (batch(2), 4, 2048, 64))
    if grid.quick:
        return [("minilm", (batch(4), 12, 128, 32), KINDS)]
    few = ("full", "causal", "padded")
    if grid.full:
        lengths = [
            ("bert-base", (batch(64), 12, 32, 64)),
            ("bert-base", (batch(16), 12, 128, 64)),
            bert_base,
            long,
            ("long", (batch(2), 1, 4096, 64)),
        ]
        wide = ("wide", (batch(2), 8, 512, 128), few)
        return [*((*labelled, KINDS) for labelled in lengths), (*minilm, few), wide]
    if operator == "attention_training":
        return [(*minilm, ("full",)), (*bert_base, KINDS)]
    return [(*minilm, few), (*bert_base, KINDS), (*long, few)]


def _case(
    operator: str, name: str, kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> Case:
    B, H, N, D = shape
    training = operator == "attention_training"
    rivals = RIVALS[kind]

    def draw() -> tuple:
        generator = torch.Generator().manual_seed(0)
        *qkv, grad_out = (
            torch.randn(B, H, N, D, generator=generator, dtype=dtype).to(device) for _ in range(4)
        )
        fourth = _fourth_input(kind, shape, dtype, generator)
        inputs = [*qkv, *(tensor.to(device) for tensor in fourth)]
        if not training:
            return tuple(inputs)
        return *(tensor.requires_grad_(tensor.is_floating_point()) for tensor in inputs), grad_out

    return Case(
        operator=operator,
        name=f"{name} {B}x{H}x{N}x{D}",
        dtype=dtype,
        # torch's fused operator is a single call that the compiler leaves as it is: it gets the naive one.
        contenders=rivals.contenders(rivals.naive, forward_and_backward if training else forward),
        draw=draw,
        judge=dropout.Judge(DROPOUT) if kind == "dropout" else by_the_rule,
        needs_grad=training,
        backend=serving(rivals.fastformer, backward=training),
        # Backward: two products for dV and dP, two for dQ and dK, and the scores once more, which nobody who
        # does not keep them can do without. The usual count.
        flops=(14 if training else 4) * H * D * _scores(kind, B, N),
    )


def _fourth_input(
    kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """What a kind takes beside query, key and value."""
    B, H, N, _ = shape
    if kind == "masked":
        return (torch.rand(B, 1, N, N, generator=generator) < 0.7,)  # True = may attend
    if kind == "padded":
        return (torch.arange(N) < _lengths(B, N)[:, None],)  # [B, N], True = real token
    if kind == "bias":
        return (torch.randn(1, H, N, N, generator=generator, dtype=dtype),)
    # Given, so that the reference can drop the same. Drawing it would cost a microsecond.
    return (torch.tensor([1]),) if kind == "dropout" else ()


def _lengths(B: int, N: int) -> torch.Tensor:
    return torch.linspace(N // 4, N, B).round().long()


def _scores(kind: str, B: int, N: int) -> int:
    """Scores of one head that the result needs; a random mask leaves no block of them out."""
    return {"causal": B * N * (N + 1) // 2, "padded": N * int(_lengths(B, N).sum())}.get(kind, B * N * N)


def _scores_of(query, key):
    return query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5


def full_naive(query, key, value):
    return _scores_of(query, key).softmax(-1) @ value


def causal_naive(query, key, value):
    scores = _scores_of(query, key)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ value


def masked_naive(query, key, value, mask):
    return _scores_of(query, key).masked_fill(~mask, -torch.inf).softmax(-1) @ value


def padded_naive(query, key, value, real):
    return masked_naive(query, key, value, real[:, None, None, :])


def dropout_naive(query, key, value, seed):
    return F.dropout(_scores_of(query, key).softmax(-1), DROPOUT) @ value


def bias_naive(query, key, value, bias):
    return (_scores_of(query, key) + bias).softmax(-1) @ value


sdpa = F.scaled_dot_product_attention
RIVALS = {
    "full": Rivals(naive=full_naive, torch=sdpa, fastformer=fastformer.attention),
    "causal": Rivals(
        naive=causal_naive,
        torch=lambda q, k, v: sdpa(q, k, v, is_causal=True),
        fastformer=lambda q, k, v: fastformer.attention(q, k, v, causal=True),
    ),
    "masked": Rivals(
        naive=masked_naive,
        torch=sdpa,
        fastformer=lambda q, k, v, mask: fastformer.attention(q, k, v, mask=mask),
    ),
    "padded": Rivals(
        naive=padded_naive,
        torch=lambda q, k, v, real: sdpa(q, k, v, real[:, None, None, :]),
        fastformer=lambda q, k, v, real: fastformer.attention(q, k, v, key_padding_mask=real),
    ),
    "dropout": Rivals(
        naive=dropout_naive,
        torch=lambda q, k, v, seed: sdpa(q, k, v, dropout_p=DROPOUT),
        fastformer=lambda q, k, v, seed: fastformer.attention(q, k, v, dropout_p=DROPOUT, seed=seed),
    ),
    "bias": Rivals(
        naive=bias_naive,
        torch=sdpa,
        fastformer=lambda q, k, v, bias: fastformer.attention(q, k, v, bias=bias),
    ),
}


def bench_attention(take):
    take()
