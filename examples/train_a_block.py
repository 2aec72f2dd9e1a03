"""A pre-norm Transformer written with fastformer's operators, trained to spell English.

The text is Python's own language reference; a few minutes on two cores bring the loss well below that of
guessing by letter frequency (about 3 nats).
"""

import argparse
from pydoc_data.topics import topics

import torch
from torch import nn

import fastformer


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project_in, self.project_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, total):
        """`total` [B, N, E] is the residual stream, `x` what the block before adds to it."""
        normed, total = self._add_norm(x, total, self.norm1)
        # [B, N, 3E] -> three of [B, H, N, D], read through their strides
        query, key, value = self.project_in(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = fastformer.attention(query, key, value, causal=True)
        x = self.project_out(attended.transpose(1, 2).flatten(-2))
        normed, total = self._add_norm(x, total, self.norm2)
        up, down = self.up, self.down
        return fastformer.feed_forward(normed, up.weight, up.bias, down.weight, down.bias), total

    def _add_norm(self, x, total, norm):
        dropout_p = 0.1 if self.training else 0.0
        return fastformer.add_norm(x, total, norm.weight, norm.bias, eps=norm.eps, dropout_p=dropout_p)


class Speller(nn.Module):
    def __init__(self, symbols: int, length: int, width: int = 128, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.symbol, self.place = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.read_out = nn.Linear(width, symbols)

    def forward(self, indices):
        total = self.symbol(indices) + self.place.weight
        x = torch.zeros_like(total)
        for block in self.blocks:
            x, total = block(x, total)
        return self.read_out(x + total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = "\n".join(topics[name] for name in sorted(topics))
    symbols = sorted(set(text))
    index = {symbol: number for number, symbol in enumerate(symbols)}
    data = torch.tensor([index[symbol] for symbol in text])
    length = 128
    model = Speller(len(symbols), length).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        starts = torch.randint(len(data) - length, (16, 1))
        window = data[starts + torch.arange(length + 1)].to(device)
        loss = nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:4}: {loss.item():.3f} nats a character", flush=True)


if __name__ == "__main__":
    main()
