"""The byte-level network of the compressor in floating point: what is trained, and then turned into integers.

A causal transformer whose parts all have a cheap exact integer form: RMSNorm without gains (the next matrix absorbs
them), one key-value head for all queries, keys and queries of unit size, a learned bias for each head and distance
instead of rotations, attention to the last `window` bytes only, squared ReLU, and tables of hashed short contexts
(`integer_features`) that cost a few additions a byte and spare the first layers the work of counting letters.

With segment codes, an encoder that has seen all of a sequence makes one of it in training, and each level of each
dimension adds a row of its own to the input of the network at every byte. Compressing needs the rows alone.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.entropy.codec.byte_config import ByteModelConfig
from luthier.entropy.codec.integer_features import LETTER, LETTERS, MASK, NEWLINE, ORDERS, SPREAD, WORD
from luthier.entropy.quantizer import fsq_straight_through, fsq_values

EPSILON = 1e-6
ENCODER_BITS = 12  # logarithm of the number of features of the encoder of segment codes


def normalized(x: Tensor) -> Tensor:
    """Each last axis divided by its root mean square."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPSILON)


def context_rows(ids: Tensor, table_bits: tuple[int, ...]) -> list[Tensor]:
    """Rows of the hashed tables at each position of bytes (B, T), as `integer_features.History` gives them."""
    ids = ids.long()
    padded = F.pad(ids, (max(ORDERS) - 1, 0), value=NEWLINE)
    recent = torch.zeros_like(ids)
    keys = []
    for back in range(max(ORDERS)):
        start = max(ORDERS) - 1 - back
        recent = recent | padded[:, start : start + ids.shape[1]] << 8 * back
        if back + 1 in ORDERS:
            keys.append(recent)
    word, before = _words(ids)
    keys += [word, word * WORD + before & MASK]
    return [(key * SPREAD & MASK) >> 32 - bits for key, bits in zip(keys, table_bits, strict=True)]


def _words(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hash of the word so far and of the word before it, at each position (B, T)."""
    letters = torch.from_numpy(LETTERS.astype("int64")).to(ids.device)[ids].T.contiguous()
    word = before = torch.zeros_like(letters[0])
    words, befores = [], []
    for letter in letters:
        inside = letter != 0
        before = torch.where(inside | (word == 0), before, word)
        word = torch.where(inside, word * LETTER + letter & MASK, 0)
        words.append(word)
        befores.append(before)
    return torch.stack(words, 1), torch.stack(befores, 1)


class Attention(nn.Module):
    """Attention of `heads` queries to one key and value for each of the last `window` positions."""

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.heads * config.head_width
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key_value = nn.Linear(config.width, 2 * config.head_width, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)
        self.sharpness = nn.Parameter(torch.zeros(config.heads))
        slopes = 2.0 ** -torch.arange(1.0, config.heads + 1)
        self.distance = nn.Parameter(-slopes[:, None] * torch.arange(config.window).sqrt())

    def forward(self, x: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, T, D) normalized, T a multiple of the window -> (B, T, D)."""
        config, (batch, length, _) = self.config, x.shape
        size, heads, chunks = config.window, config.heads, length // config.window
        key, value = self.key_value(x).chunk(2, -1)
        query = normalized(self.query(x).view(batch, length, heads, config.head_width))
        query = query * (self.sharpness.exp() * config.head_width**-0.5)[:, None]
        query = query.view(batch, chunks, size, heads, -1).transpose(2, 3).reshape(batch, chunks, heads * size, -1)
        key, value = _with_previous(normalized(key), size), _with_previous(value, size)
        distance, outside = pairs
        scores = (query @ key.transpose(-1, -2)).view(batch, chunks, heads, size, 2 * size)
        scores = scores + self.distance[:, distance].masked_fill(outside, -math.inf)
        first = torch.cat([scores[:, :1, ..., :size].new_full((1,), -math.inf).expand(size), scores.new_zeros(size)])
        scores = torch.cat([scores[:, :1] + first, scores[:, 1:]], 1)
        mixed = scores.softmax(-1).view(batch, chunks, heads * size, 2 * size) @ value
        mixed = mixed.view(batch, chunks, heads, size, -1).transpose(2, 3).reshape(batch, length, -1)
        out: Tensor = self.out(mixed)
        return out


def _with_previous(x: Tensor, size: int) -> Tensor:
    """(B, T, H) -> (B, T / size, 2 size, H): each chunk behind the one before it, zeros before the first."""
    chunks = x.unflatten(1, (-1, size))
    return torch.cat([F.pad(chunks, (0, 0, 0, 0, 1, 0))[:, :-1], chunks], 2)


class Block(nn.Module):
    """Attention, then a feed-forward network with squared ReLU, each on the normalized residual stream."""

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        x = x + self.attention(normalized(x), pairs)
        out: Tensor = x + self.down(F.relu(self.up(normalized(x))).square())
        return out


class SegmentCode(nn.Module):
    """What makes a code of m dimensions of a sequence, and what the network is given of it.

    The encoder is a linear map of how often each hashed short context occurs, made comparable by `center`.
    """

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        self.dims, self.levels = config.code_dims, config.code_levels
        self.numbers = nn.Linear(1 << ENCODER_BITS, self.dims, bias=False)
        self.direction = nn.Parameter(torch.zeros(self.dims, config.width))  # times a level's value, -1 to 1
        self.presence = nn.Parameter(torch.zeros(self.dims, config.width))  # whenever the dimension has a level
        self.register_buffer("usual", torch.zeros(1 << ENCODER_BITS), persistent=False)

    def features(self, ids: Tensor) -> Tensor:
        """Bytes (B, T) to square roots of the shares of their contexts (B, 2^12), less what is usual."""
        rows = torch.cat(context_rows(ids, (ENCODER_BITS,) * (len(ORDERS) + 2)), 1)
        counts = torch.zeros(len(ids), 1 << ENCODER_BITS, device=ids.device)
        counts.scatter_add_(1, rows, torch.ones_like(rows, dtype=counts.dtype))
        return (counts / rows.shape[1]).sqrt() - self.get_buffer("usual")

    @torch.no_grad()
    def center(self, ids: Tensor) -> None:
        """Make the numbers of sample sequences (B, T) spread about 0 by 1, so that all levels are in use at first."""
        self.get_buffer("usual").copy_(self.get_buffer("usual") + self.features(ids).mean(0))
        self.numbers.weight.div_(self.encode(ids).std(0)[:, None].clamp_min(1e-3))

    def encode(self, ids: Tensor) -> Tensor:
        """Bytes (B, T) to numbers before rounding (B, m)."""
        numbers: Tensor = self.numbers(self.features(ids))
        return numbers

    def added(self, numbers: Tensor, sent: Tensor) -> Tensor:
        """What the first `sent` (B) dimensions of numbers (B, m), rounded, add to the input: (B, D)."""
        kept = (torch.arange(self.dims, device=sent.device) < sent[:, None]).float()
        values = fsq_straight_through(numbers, self.levels)
        return (values * kept) @ self.direction + kept @ self.presence

    def rows(self) -> Tensor:
        """(m, L, D): what each level of each dimension adds."""
        values = fsq_values(torch.arange(self.levels, device=self.direction.device), self.levels)
        return values[:, None] * self.direction[:, None] + self.presence[:, None]


class ByteModel(nn.Module):
    """Bytes (B, T) to logits in nats of the next byte (B, T, 256)."""

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (256, *(1 << bits for bits in config.table_bits))
        self.tables = nn.ModuleList(nn.Embedding(rows, config.width) for rows in sizes)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, 256, bias=False)
        self.segment = SegmentCode(config) if config.code_dims else None

    @property
    def layers(self) -> list[Block]:
        """The blocks in order."""
        return [cast("Block", block) for block in self.blocks]

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Random weights: matrices at the inverse root of their inputs, zero where blocks and contexts write."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.startswith("segment."):
                continue
            if name.endswith((".out.weight", ".down.weight")) or name.startswith("tables."):
                weight.zero_()
            elif name.endswith(".weight"):
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        self.tables[0].get_parameter("weight").normal_(std=0.5, generator=generator)
        self.head.weight.mul_(0.5)
        if self.segment is not None:  # last, so that the rest begins as it does without codes
            self.segment.numbers.weight.normal_(generator=generator)
            self.segment.direction.normal_(std=0.1, generator=generator)
            self.segment.presence.zero_()

    def forward(self, ids: Tensor, sent: Tensor | None = None) -> Tensor:
        """ids (B, T) bytes; the streams start with the first of them.

        sent: how many dimensions (B) of the code of each sequence the network is given; None: none.
        """
        length, window, whole = ids.shape[1], self.config.window, ids
        ids = F.pad(ids, (0, -length % window), value=NEWLINE)
        rows = [ids.long(), *context_rows(ids, self.config.table_bits)]
        x: Tensor = sum(table(row) for table, row in zip(self.tables, rows, strict=True))
        if sent is not None and self.segment is not None:
            x = x + self.segment.added(self.segment.encode(whole), sent)[:, None]
        ages = torch.arange(window, device=ids.device)[:, None] + window - torch.arange(2 * window, device=ids.device)
        pairs = ages.clamp(0, window - 1), (ages < 0) | (ages >= window)
        for block in self.blocks:
            x = block(x, pairs)
        logits: Tensor = self.head(normalized(x))
        return logits[:, :length]
