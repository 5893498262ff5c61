"""Attention over per-layer page tables against dense attention over exactly the kept tokens.

A small cache is served as the engine would: prompts in plain pages, survivors moved to private
pages that layers share unevenly, two steps of new tokens written through the slots that
``fill_page_tables`` gives. Attention then reads pages, tables and lengths; the oracle has never
heard of them. On a GPU the attention is xformers' paged split-K operator, which shares no code with
this package; a plain torch version stands in everywhere, so that the test itself is tested.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcompress_kernels.compaction import move_tokens
from kvcompress_kernels.dispatch import Implementation
from kvcompress_kernels.page_tables import ArenaTables, StepTables, fill_page_tables

LAYERS = 3
TOLERANCE = {
    # dtype: (atol, rtol); probabilities and result are rounded to the dtype.
    torch.float32: (1e-5, 1e-5),
    torch.float16: (4e-3, 4e-4),
    torch.bfloat16: (2e-2, 5e-3),
}

# queries [T, H, D], cache [P, N, bs, 2 D], tables [B, W], lengths, tokens of each row, scale;
# returns [T, H, D].
Attention = Callable[[Tensor, Tensor, Tensor, list[int], int, float], Tensor]


def dense_attention(queries: Tensor, held: Tensor, scale: float) -> Tensor:
    """Causal attention of the last tokens' queries [t, H, D] on keys and values [N, S, 2 D]."""
    tokens, heads, dim = queries.shape
    key, value = held.repeat_interleave(heads // len(held), dim=0).split(dim, dim=-1)
    logits = queries.transpose(0, 1) @ key.transpose(-1, -2) * scale
    position = torch.arange(held.shape[1], device=held.device)
    hidden = position > position[-tokens:, None]
    attention = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return (attention @ value).transpose(0, 1)


@dataclass
class Request:
    """``kept``: per layer, token numbers [N, count] of the prompt; None if it is not compressed.

    ``history``: per layer, keys and values [N, S, 2 D] of all tokens so far.
    """

    kept: list[Tensor] | None
    history: list[Tensor]
    prompt: int
    blocks: list[int]
    slot: int = -1
    growth: int = 0


class Server:
    """What an engine would do around the kernels, in the plainest way."""

    def __init__(
        self, dtype, kv_heads: int, dim: int, size: int, device, implementation: Implementation
    ):
        self.rng = np.random.default_rng(0)
        self.generator = torch.Generator().manual_seed(0)
        self.heads, self.dim, self.size = kv_heads, dim, size
        self.dtype, self.device, self.implementation = dtype, device, implementation
        blocks = 60
        self.free = self.rng.permutation(blocks).tolist()
        # NHD, block outermost: page (l, b) is b * L + l. Whatever was not written is NaN.
        shape = (blocks * LAYERS, size, kv_heads, 2 * dim)
        self.cache = torch.full(shape, torch.nan, dtype=dtype, device=device).transpose(1, 2)
        self.requests: list[Request] = []
        slots, width = 5, 8
        self.arena = ArenaTables(
            torch.full((LAYERS, slots, width), 10**8, dtype=torch.int32, device=device),
            torch.zeros(LAYERS, slots, dtype=torch.int32, device=device),
            torch.zeros(LAYERS, slots, dtype=torch.int32, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
            torch.arange(LAYERS, dtype=torch.int64, device=device),
            step=LAYERS,
            block_size=size,
        )
        self.out = StepTables.allocate(LAYERS, 6, 30, 6 * size, device)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def ids(self, values) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=torch.int32, device=self.device)

    def take(self, count: int) -> list[int]:
        return [self.free.pop() for _ in range(count)]

    def admit(self, prompt: int, used: list[int] | None, slack: int = 0) -> None:
        """Prefill; where ``used`` has pages per layer, keep that many, the last but for slack."""
        history = [self.random(self.heads, prompt, 2 * self.dim) for _ in range(LAYERS)]
        blocks = self.take(-(-prompt // self.size))
        token = np.arange(prompt)
        for layer, values in enumerate(history):
            page = self.ids(np.asarray(blocks)[token // self.size] * LAYERS + layer).long()
            self.cache[page, :, self.ids(token % self.size).long()] = values.transpose(0, 1).to(
                self.device
            )
        if used is None:
            self.requests.append(Request(None, history, prompt, blocks))
            return
        counts = [pages * self.size - slack for pages in used]
        private = self.take(sum(used) // LAYERS)
        # Pages are dealt to layers at random: any page can hold tokens of any layer.
        pages = self.rng.permutation([b * LAYERS + la for b in private for la in range(LAYERS)])
        dealt = np.split(pages, np.cumsum(used)[:-1])
        kept = [self._choose(prompt, count) for count in counts]
        tokens = torch.full((LAYERS, self.heads, max(counts)), -1, dtype=torch.int32)
        target = np.full((LAYERS, max(used)), 10**8)
        slot = len(self.requests)
        for layer, (chosen, ids) in enumerate(zip(kept, dealt, strict=True)):
            tokens[layer, :, : chosen.shape[1]] = chosen
            target[layer, : len(ids)] = ids
            self.arena.pages[layer, slot, : len(ids)] = self.ids(ids)
            self.arena.used[layer, slot] = len(ids)
            self.arena.shift[layer, slot] = counts[layer] - prompt
        self.arena.growth[slot] = len(private)
        source = np.asarray(blocks)[None] * LAYERS + np.arange(LAYERS)[:, None]
        move_tokens(
            self.cache,
            self.ids(source),
            tokens.to(self.device),
            counts,
            self.ids(target),
            implementation=self.implementation,
        )
        # The prompt's blocks go back to the pool: nobody may read them any more.
        self.cache[self.ids(source).flatten().long()] = torch.nan
        self.requests.append(Request(kept, history, prompt, private, slot, len(private)))

    def _choose(self, prompt: int, count: int) -> Tensor:
        """[N, count] random token numbers, ascending, every head its own."""
        order = torch.rand(self.heads, prompt, generator=self.generator).argsort(dim=1)
        return order[:, :count].sort(dim=1).values

    def step(self, tokens: list[int]) -> None:
        """Append that many random tokens to each request, through tables and slots."""
        fresh = [
            [self.random(self.heads, count, 2 * self.dim) for count in tokens]
            for _ in range(LAYERS)
        ]
        for index, request in enumerate(self.requests):
            for layer in range(LAYERS):
                request.history[layer] = torch.cat(
                    (request.history[layer], fresh[layer][index]), dim=1
                )
            self._grow(request)
        width = max(len(request.blocks) for request in self.requests)
        table = np.full((len(self.requests), width), 10**7)
        for row, request in enumerate(self.requests):
            table[row, : len(request.blocks)] = request.blocks
        fill_page_tables(
            self.arena,
            self.out,
            slots=self.ids([request.slot for request in self.requests]),
            block_table=self.ids(table),
            seq_lens=self.ids([request.history[0].shape[1] for request in self.requests]),
            query_start=self.ids(np.cumsum([0, *tokens])),
            num_tokens=sum(tokens),
            implementation=self.implementation,
        )
        for layer in range(LAYERS):
            slot = self.out.slot_mapping[layer, : sum(tokens)]
            values = torch.cat(fresh[layer], dim=1).transpose(0, 1).to(self.device)
            self.cache[slot // self.size, :, slot % self.size] = values

    def _grow(self, request: Request) -> None:
        length = request.history[0].shape[1]
        if request.kept is None:
            held = len(request.blocks)
            needed = -(-length // self.size)
        else:
            held = len(request.blocks) - request.growth
            # All layers fill their last page alike.
            room = -request.kept[0].shape[1] % self.size
            needed = -(-max(length - request.prompt - room, 0) // self.size)
        request.blocks.extend(self.take(max(needed - held, 0)))

    def expected(self, queries: Tensor, tokens: int, layer: int, scale: float) -> Tensor:
        """float64 [T, H, D]: causal attention of each request's last tokens on what is kept."""
        results = []
        for row, request in enumerate(self.requests):
            history = request.history[layer].double()
            if request.kept is not None:
                chosen = request.kept[layer][:, :, None].expand(-1, -1, 2 * self.dim)
                survivors = history.gather(1, chosen)
                history = torch.cat((survivors, history[:, request.prompt :]), dim=1)
            own = queries[row * tokens : (row + 1) * tokens].double()
            results.append(dense_attention(own, history, scale))
        return torch.cat(results)


def torch_attention(
    queries: Tensor, cache: Tensor, tables: Tensor, lengths: list[int], tokens: int, scale: float
) -> Tensor:
    """Paged attention, one row at a time, in fp32."""
    size = cache.shape[2]
    results = []
    for row, length in enumerate(lengths):
        pages = tables[row, : -(-length // size)].long()
        held = cache[pages].float().transpose(0, 1).flatten(1, 2)[:, :length]
        own = queries[row * tokens : (row + 1) * tokens].float()
        results.append(dense_attention(own, held, scale))
    return torch.cat(results).to(queries.dtype)


def xformers_attention(
    queries: Tensor, cache: Tensor, tables: Tensor, lengths: list[int], tokens: int, scale: float
) -> Tensor:
    """xformers' split-K operator; a causal mask where a row has more than one token."""
    from xformers.ops import fmha
    from xformers.ops.fmha import attn_bias
    from xformers.ops.fmha.triton_splitk import FwOp

    pages, kv_heads, size, width = cache.shape
    total, heads, dim = queries.shape
    mask = (
        attn_bias.PagedBlockDiagonalPaddedKeysMask
        if tokens == 1
        else attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
    )
    bias = mask.from_seqlens(
        q_seqlen=[tokens] * len(lengths),
        kv_seqlen=lengths,
        block_tables=tables,
        page_size=size,
        device=queries.device,
    )
    # [P, N, bs, C] in NHD order is [P * bs, N, C]; query heads of a group share a KV head.
    group = heads // kv_heads
    flat = cache.transpose(1, 2).reshape(1, pages * size, kv_heads, 1, width)
    assert flat.data_ptr() == cache.data_ptr(), "the cache must be in NHD order"
    key, value = flat.expand(-1, -1, -1, group, -1).split(dim, dim=-1)
    # A tile of keys must not reach beyond a page.
    operator = type("PagedSplitK", (FwOp,), {"BLOCK_N": min(size, 64)})
    found = fmha.memory_efficient_attention_forward(
        queries.view(1, total, kv_heads, group, dim),
        key,
        value,
        attn_bias=bias,
        scale=scale,
        op=operator,
    )
    return found.reshape(total, heads, dim)


def serve(attention: Attention, dtype, group, dim, size, tokens, device, implementation) -> None:
    """Two plain and three compressed requests, a step that appends, one that is checked."""
    kv_heads = 2
    server = Server(dtype, kv_heads, dim, size, device, implementation)
    server.admit(5 * size + 3, [1, 3, 2])
    server.admit(2 * size + 1, None)
    server.admit(4 * size, [4, 1, 1], slack=size - 1)
    server.admit(6 * size - 1, [2, 2, 2], slack=2)
    server.admit(3, None)
    server.step([size + 1, 1, 2 * size, 2, size - 2])
    server.step([tokens] * 5)
    scale = dim**-0.5
    atol, rtol = TOLERANCE[dtype]
    queries = server.random(5 * tokens, group * kv_heads, dim)
    width = int(-(-server.out.seq_lens.max() // size))
    for layer in range(LAYERS):
        found = attention(
            queries.to(device),
            server.cache,
            server.out.block_tables[layer, :5, :width],
            server.out.seq_lens[layer, :5].tolist(),
            tokens,
            scale,
        )
        expected = server.expected(queries, tokens, layer, scale)
        torch.testing.assert_close(found.cpu().double(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("tokens", [1, 4])
def test_plain_torch_attention(implementation, group, tokens, device):
    serve(torch_attention, torch.float32, group, 16, 16, tokens, device, implementation)


def missing() -> str:
    """What xformers' operator cannot do without, "" if all is there."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    if importlib.util.find_spec("xformers") is None:
        return "needs xformers"
    major, minor = importlib.metadata.version("triton").split(".")[:2]
    if (int(major), int(minor)) >= (3, 9):
        return "xformers 0.0.35 uses block pointers, which Triton dropped in 3.9"
    return ""


@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (4, 128), (7, 64), (8, 128)])
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("tokens", [1, 4])
def test_xformers_paged_attention(dtype, group, dim, size, tokens, device):
    serve(xformers_attention, dtype, group, dim, size, tokens, device, "triton")
