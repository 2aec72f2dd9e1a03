"""The operators one by one, on a batch of two sequences of different length."""

import torch

import fastformer

B, H, N, D = 2, 12, 128, 64
E, F = H * D, 4 * H * D
query, key, value = (torch.randn(B, H, N, D) for _ in range(3))
real = torch.arange(N) < torch.tensor([[128], [57]])  # [B, N], True = real token

out, lse = fastformer.attention(query, key, value, key_padding_mask=real, return_lse=True)
print("attention", tuple(out.shape), "and log-sum-exp", tuple(lse.shape))

x, residual = torch.randn(B, N, E), torch.randn(B, N, E)
weight, bias = torch.ones(E), torch.zeros(E)
normed, total = fastformer.add_norm(x, residual, weight, bias, dropout_p=0.1)
print("add_norm", tuple(normed.shape), "and the sum", tuple(total.shape))

w1, w2 = torch.randn(F, E) / E**0.5, torch.randn(E, F) / F**0.5
hidden = fastformer.feed_forward(normed, w1, None, w2, None, activation="gelu")
print("feed_forward", tuple(hidden.shape))

# What would run a call, and why nothing faster does.
print(fastformer.explain(fastformer.attention, query, key, value, key_padding_mask=real))
