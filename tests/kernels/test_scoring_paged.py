"""Window statistics read from pages: Triton and the torch twin against a float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompress_kernels import scoring_triton
from kvcompress_kernels.dispatch import Implementation
from kvcompress_kernels.scoring import PagedStatistics, paged_window_statistics
from tests.kernels.test_scoring import oracle

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Inputs are rounded before the oracle sees them. What is left are fp32 sums, and on a GPU the
# tensor cores' fp32 accumulation, which truncates, and its approximate exponential.
TOLERANCE = {
    # queries' dtype: (atol, rtol)
    F32: (1e-7, 2e-5),
    F16: (1e-7, 1e-4),
    BF16: (1e-7, 1e-4),
}
BOTH: tuple[Implementation, ...] = ("triton", "torch")


@pytest.fixture(autouse=True)
def _several_shares(monkeypatch) -> None:
    """Short prompts are shared between programs as long ones are."""
    monkeypatch.setattr(scoring_triton, "_MIN_SHARE", 64)


@pytest.fixture
def _nan_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that what a kernel leaves unwritten is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


pytestmark = pytest.mark.usefixtures("_nan_memory")


@dataclass
class Case:
    """Arguments of one call; everything that must not be read holds NaN or a bad page id."""

    queries: Tensor
    cache: Tensor
    table: Tensor
    num_tokens: list[int]
    window: int
    scale: list[float]
    soft_cap: float = 0.0
    sinks: Tensor | None = None
    keys: list[Tensor] = field(default_factory=list)  # [N, S, D] of each job, as stored

    def run(self, implementation: Implementation) -> PagedStatistics:
        names = ("num_tokens", "window", "scale", "soft_cap", "sinks")
        options = {name: getattr(self, name) for name in names}
        return paged_window_statistics(
            self.queries, self.cache, self.table, **options, implementation=implementation
        )


def build(
    device: torch.device,
    *,
    lengths: list[int],
    group: int = 2,
    kv_heads: int = 1,
    rows: int = 32,
    window: int | None = None,
    dim: int = 32,
    page: int = 16,
    dtype: torch.dtype = F32,
    key_dtype: torch.dtype | None = None,
    heads_first: bool = False,
    peak: float = 1.0,
    seed: int = 0,
    ids: torch.dtype = torch.int64,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    jobs, heads = len(lengths), group * kv_heads
    key_dtype = key_dtype or dtype
    width = -(-max(lengths) // page) + 1
    used = sum(-(-n // page) for n in lengths)
    order = torch.randperm(used + 5, generator=generator)
    pool = torch.full((used + 5, page, kv_heads, 2 * dim), math.nan)
    table = torch.full((jobs, width), 1 << 30, dtype=ids)
    keys, taken = [], 0
    for r, tokens in enumerate(lengths):
        pages = order[taken : taken + -(-tokens // page)]
        taken += len(pages)
        table[r, : len(pages)] = pages.to(ids)
        own = torch.randn(tokens, kv_heads, dim, generator=generator).to(key_dtype)
        for token in range(tokens):
            pool[pages[token // page], token % page, :, :dim] = own[token].float()
        keys.append(own.transpose(0, 1).to(device))
    pool = pool.transpose(1, 2)
    if heads_first:
        pool = pool.contiguous()
    queries = torch.randn(jobs, rows, heads, dim, generator=generator) * peak
    return Case(
        queries=queries.to(device, dtype).transpose(1, 2),
        cache=pool.to(key_dtype).to(device)[..., :dim],
        table=table.to(device),
        num_tokens=lengths,
        window=window or rows,
        scale=[dim**-0.5 * (1 + r / 8) for r in range(jobs)],
        keys=keys,
    )


def expected(case: Case, r: int) -> tuple[Tensor, Tensor, float, float, Tensor]:
    sinks = None if case.sinks is None else case.sinks[r]
    return oracle(case.queries[r], case.keys[r], case.window, case.scale[r], case.soft_cap, sinks)


def check(case: Case, *, widen: float = 1.0) -> None:
    """Both implementations against the oracle; foreign columns stay unwritten."""
    atol, rtol = (widen * t for t in TOLERANCE[case.queries.dtype])
    for implementation in BOTH:
        found = case.run(implementation)
        assert found.entropy.dtype == found.shift.dtype == torch.float64
        for r in range(len(case.num_tokens)):
            mean, var, entropy, shift, _ = expected(case, r)
            job = found.job(r)
            own = job.mean.shape[1]
            assert own == case.num_tokens[r] - case.window
            torch.testing.assert_close(job.mean.double(), mean, atol=atol, rtol=rtol)
            torch.testing.assert_close(job.var.double(), var, atol=atol, rtol=rtol)
            assert float(job.entropy) == pytest.approx(entropy, rel=rtol, abs=1e-5)
            assert float(job.shift) == pytest.approx(shift, rel=rtol, abs=1e-9)
            if case.queries.shape[2] == 1:  # one query has no variance
                assert not job.var.any()
            for whole in (found.mean, found.var):
                assert whole[r, :, own:].isnan().all()


SHAPES = [
    *(
        {"dtype": dtype, "key_dtype": key_dtype, "dim": 64}
        for dtype, key_dtype in (
            (F32, F32), (F16, F16), (BF16, BF16), (BF16, E4M3), (F16, E5M2), (F32, E4M3),
            (F16, BF16),
        )
    ),
    *({"group": group, "kv_heads": 2, "dtype": BF16} for group in (1, 3, 4, 7, 8)),
    *({"dim": dim, "dtype": dtype} for dim in (32, 80, 96, 128, 256) for dtype in (F32, F16)),
    *(
        {"heads_first": heads_first, "ids": ids, "kv_heads": 2, "dtype": F16}
        for heads_first in (False, True)
        for ids in (torch.int32, torch.int64)
    ),
]  # fmt: skip


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_types_heads_and_layouts(device, options):
    case = build(device, lengths=[75, 130], **options)
    assert case.cache.dtype == options.get("key_dtype", options["dtype"])
    heads = 1 if options.get("heads_first") else options.get("kv_heads", 1)
    assert case.cache.stride(2) == heads * 2 * case.cache.shape[3]
    check(case)


@pytest.mark.parametrize("page", [16, 32, 48, 64, 128])
def test_lengths_around_page_and_tile_borders(device, page):
    """All in one launch, from a single history token on."""
    rows = 7
    near = {n + d for n in (page, 2 * page, 64, 128) for d in (-1, 0, 1)} | {rows + 1}
    check(build(device, lengths=sorted(near), rows=rows, page=page, dtype=BF16))


@pytest.mark.parametrize(("rows", "window"), [(1, 1), (1, 32), (3, 3), (5, 40), (16, 20)])
def test_fewer_queries_than_the_window(device, rows, window):
    check(build(device, lengths=[90, 140], rows=rows, window=window, group=3))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_soft_cap_and_sinks(device, dtype):
    case = build(device, lengths=[40, 80], kv_heads=2, rows=8, peak=3.0, dtype=dtype)
    sinks = torch.linspace(-3.0, 16.0, 8, device=device).reshape(2, 4)
    check(replace(case, soft_cap=2.5))
    check(replace(case, sinks=sinks))
    check(replace(case, sinks=sinks.to(dtype), soft_cap=20.0))


def test_a_sink_may_swallow_everything(device):
    case = build(device, lengths=[80])
    case.sinks = torch.full((1, 2), 300.0, device=device)
    for implementation in BOTH:
        found = case.run(implementation)
        assert float(found.mean.sum()) < 1e-30
        assert float(found.entropy[0]) == pytest.approx(0.0, abs=1e-9)


@settings(max_examples=15, derandomize=True)
@given(
    group=st.sampled_from([1, 2, 5, 7]),
    rows=st.integers(1, 33),
    more=st.integers(0, 5),
    histories=st.lists(st.integers(1, 130), min_size=1, max_size=2),
    dtype=st.sampled_from([F16, BF16, F32]),
    dim=st.sampled_from([32, 40, 80]),
    page=st.sampled_from([16, 48, 64]),
    soft_cap=st.sampled_from([0.0, 5.0]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_odd_shapes(
    device, group, rows, more, histories, dtype, dim, page, soft_cap, with_sinks, seed
):
    window = rows + more
    lengths = [n + window for n in histories]
    case = build(
        device, lengths=lengths, group=group, rows=rows, window=window,
        dim=dim, page=page, dtype=dtype, seed=seed,
    )  # fmt: skip
    case.soft_cap = soft_cap
    if with_sinks:
        case.sinks = torch.randn(len(lengths), group, generator=torch.manual_seed(seed)).to(device)
    check(case)


def put(case: Case, token: int, values: Tensor) -> None:
    """Overwrite the key of a token of job 0, KV head 0."""
    page = case.cache.shape[2]
    case.cache[case.table[0, token // page], 0, token % page] = values.to(case.cache)
    case.keys[0][0, token] = values.to(case.cache)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("winner", [3, 118])
def test_rows_with_a_single_winner(device, dtype, winner):
    """Probabilities of exactly 0 and 1, logits thousands apart; 118 is the window's first token."""
    case = build(device, lengths=[150], dtype=dtype)
    case.cache.nan_to_num_(nan=0.0).mul_(0.0)
    case.keys[0].zero_()
    put(case, winner, torch.nn.functional.one_hot(torch.tensor(0), 32) * 1.0e3)
    case.queries.zero_()
    case.queries[..., 0] = 5.0e3
    for implementation in BOTH:
        found = case.run(implementation)
        own = torch.arange(118, device=device) == winner
        torch.testing.assert_close(found.mean[0], own.float().expand(2, -1), atol=0, rtol=1e-6)
        assert float(found.entropy[0]) == pytest.approx(0.0, abs=1e-6)
        assert float(found.shift[0]) == pytest.approx(0.0, abs=1e-12)


def test_large_logits_keep_their_precision(device):
    case = build(device, lengths=[150], dim=64, peak=30.0)
    check(case, widen=20.0)  # the products' own rounding, at logits of some hundreds


@pytest.mark.parametrize("tokens", [[5], [40], [70], [145], range(64, 128)], ids=str)
@pytest.mark.parametrize("soft_cap", [0.0, 4.0])
def test_minus_infinite_logits(device, tokens, soft_cap):
    """Keys of -inf in one dimension, all queries positive there: one, also in the window itself,
    or all that one program sees in its share of the tokens."""
    case = build(device, lengths=[150], rows=8)
    for token in tokens:
        put(case, token, torch.tensor([-math.inf] + [0.0] * 31))
    case.queries[..., 0] = case.queries[..., 0].abs() + 0.1
    case.soft_cap = soft_cap
    check(case)


@pytest.mark.parametrize("implementation", BOTH)
def test_nan_in_a_key_is_not_hidden(device, implementation):
    case = build(device, lengths=[150])
    put(case, 20, torch.full((32,), math.nan))
    found = case.run(implementation)
    assert found.mean.isnan().all()
    assert found.entropy.isnan().all()


@pytest.mark.parametrize("implementation", BOTH)
def test_a_job_does_not_depend_on_the_others(device, implementation):
    case = build(device, lengths=[40, 200, 77], kv_heads=2, rows=8, dtype=BF16)
    together = case.run(implementation)
    again = case.run(implementation)
    assert torch.equal(together.entropy, again.entropy)
    assert torch.equal(together.shift, again.shift)
    for r, tokens in enumerate(case.num_tokens):
        alone = replace(
            case,
            queries=case.queries[r : r + 1],
            table=case.table[r : r + 1],
            num_tokens=[tokens],
            scale=[case.scale[r]],
        ).run(implementation)
        own = tokens - case.window
        for mine, whole in ((alone.mean, together.mean), (alone.var, together.var)):
            assert torch.equal(mine[0], whole[r, :, :own])
        assert float(alone.entropy[0]) == pytest.approx(float(together.entropy[r]), rel=1e-12)
        assert float(alone.shift[0]) == pytest.approx(float(together.shift[r]), rel=1e-12)


@pytest.mark.parametrize("implementation", BOTH)
def test_inputs_are_left_alone(device, implementation):
    case = build(device, lengths=[90], dtype=F16)
    inputs = (case.queries, case.cache, case.table)
    before = [x.clone() for x in inputs]
    case.run(implementation)
    for now, then in zip(inputs, before, strict=True):
        torch.testing.assert_close(now, then, atol=0.0, rtol=0.0, equal_nan=True)


def test_pages_beyond_two_to_the_31_elements(device):
    """Offsets into the pool need 64 bits; only the few pages in use are ever touched."""
    case = build(device, lengths=[70], kv_heads=2, rows=4, key_dtype=E4M3)
    torch.use_deterministic_algorithms(False)  # which would fill the whole pool
    page_size = case.cache.shape[2] * case.cache.shape[1] * 2 * 32
    first = (1 << 31) // page_size
    pool = torch.empty((first + case.cache.shape[0]) * page_size, dtype=torch.uint8, device=device)
    far = pool.view(-1, 16, 2, 64).transpose(1, 2)[..., :32]
    far[first:] = case.cache.view(torch.uint8)
    moved = replace(case, cache=far.view(E4M3), table=case.table + first)
    for implementation in BOTH:
        assert torch.equal(moved.run(implementation).mean, case.run(implementation).mean)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_does_not_wait_for_the_device(device):
    case = build(device, lengths=[90, 140])
    expected = case.run("triton").mean
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = case.run("triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.mean, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": [32, 100]}, "no token lies before"),
        ({"num_tokens": [70]}, "2 jobs, but lengths"),
        ({"num_tokens": [70, 200]}, "do not hold 200 tokens"),
        ({"window": 31}, "queries must be 1 to"),
        ({"scale": [1.0, 0.0]}, "scales must be positive"),
        ({"sinks": torch.zeros(2, 3)}, "sinks must be"),
        ({"table": torch.zeros(2, 7)}, "page ids must be"),
        ({"queries": torch.zeros(2, 4, 32, 16)}, "head size"),
        ({"queries": torch.zeros(2, 3, 32, 32)}, "cannot be shared"),
        ({"queries": torch.zeros(2, 4, 32, 64)[..., ::2]}, "last stride"),
        ({"cache": torch.zeros(20, 2, 16, 32, dtype=torch.uint8)}, "must be floats"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(device, change, message):
    case = replace(build(device, lengths=[70, 100], kv_heads=2), **change)
    with pytest.raises(ValueError, match=message):
        case.run("torch")
