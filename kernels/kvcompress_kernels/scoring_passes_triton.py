# Triton gives the arguments of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def"

"""The Triton kernels that ``scoring_triton`` launches; see there for how they work together."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
# log2 of a probability that is 0 in fp32 whatever it is multiplied with; keeps 0 * (-inf) out.
_FAR_BELOW = tl.constexpr(-1.0e4)

# Differs between requests (ROWS is the window), so that nothing is compiled for its value. Queries
# and cache are always aligned.
_VARYING = ["stride_job", "stride_table", "jobs", "splits", "width", "ROWS"]
_UNALIGNED = [
    *("table", "job_data", "scales", "sinks", "sums_out", "sums_in"),
    *("top_out", "log_out", "entropy_out", "top_in", "log_in", "mean_out", "var_out", "shift_out"),
]


@triton.jit
def _pages(table, at, end, PAGE: tl.constexpr, TILE_TOKENS: tl.constexpr):
    """Page ids of the tokens from ``at`` on; page 0, of which nothing is read, from ``end`` on.

    Read a step before the keys: an address that hangs on a load of the same step would keep
    Triton from having more than one tile of keys in flight.
    """
    tile = tl.arange(0, TILE_TOKENS)
    # ``at`` is a multiple of the tile; where the page divides the tile, divisions leave the loop.
    whole = TILE_TOKENS % PAGE == 0
    index = at // PAGE + tile // PAGE if whole else (at + tile) // PAGE
    return tl.load(table + index, mask=at + tile < end, other=0)


@triton.jit
def _key_tile(
    cache,
    pages,
    at,
    end,
    stride_page,
    stride_token,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    OPERAND: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys [tokens, TILE_DIM] of one head; zero from ``end`` on (if MASKED) and beyond DIM."""
    tile = tl.arange(0, TILE_TOKENS)
    dims = tl.arange(0, TILE_DIM)
    inside = tile % PAGE if TILE_TOKENS % PAGE == 0 else (at + tile) % PAGE
    # Page ids fit into 32 bits in either type; the product with the stride does not.
    row = pages.to(tl.int32).to(tl.int64) * stride_page + inside * stride_token
    where = cache + row[:, None] + dims[None, :]
    if MASKED:
        mask = (at + tile < end)[:, None] & (dims < DIM)[None, :]
        keys = tl.load(where, mask=mask, other=0.0)
    elif DIM < TILE_DIM:
        keys = tl.load(where, mask=(dims < DIM)[None, :], other=0.0)
    else:
        keys = tl.load(where)
    return keys.to(OPERAND)


@triton.jit
def _logits(a, b, scale, soft_cap, CAPPED: tl.constexpr):
    """Products in units of ``1 / _unit(...)`` of a base-2 logit: raw, or capped."""
    raw = tl.dot(a, b, input_precision="ieee")
    if CAPPED:
        x = raw * (scale / soft_cap)
        small = tl.exp2(tl.abs(x) * (-2.0 * _LOG2E))
        tanh = (1.0 - small) / (1.0 + small)
        raw = tl.where(x < 0.0, -tanh, tanh) * soft_cap
    return raw


@triton.jit
def _unit(scale, CAPPED: tl.constexpr):
    """Factor from what ``_logits`` returns to logits of base 2."""
    return _LOG2E if CAPPED else scale * _LOG2E


@triton.jit
def _query_tile(
    queries,
    job,
    head,
    stride_job,
    stride_head,
    stride_row,
    chunk,
    GROUP: tl.constexpr,
    ROWS,
    DIM: tl.constexpr,
    OPERAND: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    """Queries [heads * rows, TILE_DIM] of one group; zero where there is none."""
    line = tl.arange(0, TILE_HEADS * TILE_ROWS)
    member = chunk * TILE_HEADS + line // TILE_ROWS
    row = line % TILE_ROWS
    dims = tl.arange(0, TILE_DIM)
    if DIM % 16 == 0:
        stride_job = tl.multiple_of(stride_job, 16)  # whole vectors, or the loads are narrow
    base = queries + job.to(tl.int64) * stride_job
    at = base + (head * GROUP + member) * stride_head + row * stride_row
    there = (member < GROUP) & (row < ROWS)
    tile = tl.load(
        at[:, None] + dims[None, :], mask=there[:, None] & (dims < DIM)[None, :], other=0.0
    )
    return tile.to(OPERAND)


@triton.jit
def _rise(top, peak, unit):
    """A row's new largest logit, and by how much (base 2, <= 0) it makes the old sums fall."""
    new = tl.maximum(top, peak)
    safe = tl.where(new == float("-inf"), 0.0, new)
    return new, safe, tl.where(top == float("-inf"), 0.0, (top - safe) * unit)


@triton.jit
def _relative(logits, safe, unit):
    """Base-2 logits relative to ``safe`` and their exponentials."""
    low = tl.maximum((logits - safe[:, None]) * unit, _FAR_BELOW, propagate_nan=tl.PropagateNan.ALL)
    return low, tl.exp2(low)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def row_sums(
    queries,
    cache,
    table,
    job_data,
    scales,
    stride_job,
    stride_head,
    stride_row,
    stride_page,
    stride_kv_head,
    stride_token,
    stride_table,
    jobs,
    heads,
    soft_cap,
    sums_out,
    GROUP: tl.constexpr,
    ROWS,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    CAPPED: tl.constexpr,
    OPERAND: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    # Neighbouring programs take the heads of the same tokens, which often lie side by side.
    CHUNKS: tl.constexpr = (GROUP + TILE_HEADS - 1) // TILE_HEADS
    head = tl.program_id(0) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    split = tl.program_id(1)
    job = tl.program_id(2)
    tokens = tl.load(job_data + job)
    history = tl.load(job_data + jobs + job)
    share = tl.load(job_data + 2 * jobs + job)
    start = split * share
    if start >= tokens:
        return
    stop = tl.minimum(start + share, tokens)
    scale = tl.load(scales + job)
    unit = _unit(scale, CAPPED)
    q = _query_tile(
        queries, job, head, stride_job, stride_head, stride_row, chunk,
        GROUP, ROWS, DIM, OPERAND, TILE_HEADS, TILE_ROWS, TILE_DIM,
    )  # fmt: skip
    cache += head.to(tl.int64) * stride_kv_head
    table += job.to(tl.int64) * stride_table
    first = tokens - ROWS  # position of the first query
    line = tl.arange(0, TILE_HEADS * TILE_ROWS)
    row = line % TILE_ROWS
    top = tl.full([TILE_HEADS * TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_HEADS * TILE_ROWS], tl.float32)
    dot = tl.zeros([TILE_HEADS * TILE_ROWS], tl.float32)
    # Tiles of history alone, which all queries see, then those that reach into the window.
    plain = start + tl.maximum(tl.minimum(stop, history) - start, 0) // TILE_TOKENS * TILE_TOKENS
    pages = _pages(table, start, stop, PAGE, TILE_TOKENS)
    for at in tl.range(start, plain, TILE_TOKENS):
        k = _key_tile(
            cache, pages, at, stop, stride_page, stride_token,
            PAGE, DIM, OPERAND, TILE_TOKENS, TILE_DIM, False,
        )  # fmt: skip
        pages = _pages(table, at + TILE_TOKENS, stop, PAGE, TILE_TOKENS)
        logits = _logits(q, tl.trans(k), scale, soft_cap, CAPPED)
        top, safe, fall = _rise(top, tl.max(logits, 1), unit)
        low, e = _relative(logits, safe, unit)
        dot = (dot + fall * total) * tl.exp2(fall) + tl.sum(e * low, 1)
        total = total * tl.exp2(fall) + tl.sum(e, 1)
    before = total
    for at in tl.range(plain, stop, TILE_TOKENS, num_stages=1):
        pages = _pages(table, at, stop, PAGE, TILE_TOKENS)
        k = _key_tile(
            cache, pages, at, stop, stride_page, stride_token,
            PAGE, DIM, OPERAND, TILE_TOKENS, TILE_DIM, True,
        )  # fmt: skip
        token = at + tl.arange(0, TILE_TOKENS)
        seen = (token[None, :] <= (first + row)[:, None]) & (token < stop)[None, :]
        logits = _logits(q, tl.trans(k), scale, soft_cap, CAPPED)
        logits = tl.where(seen, logits, float("-inf"))
        top, safe, fall = _rise(top, tl.max(logits, 1), unit)
        low, e = _relative(logits, safe, unit)
        total = total * tl.exp2(fall) + tl.sum(e, 1)
        e = tl.where((token < history)[None, :], e, 0.0)
        dot = (dot + fall * before) * tl.exp2(fall) + tl.sum(e * low, 1)
        before = before * tl.exp2(fall) + tl.sum(e, 1)
    member = chunk * TILE_HEADS + line // TILE_ROWS
    place = (job * tl.num_programs(1) + split).to(tl.int64) * heads
    out = (place + head * GROUP + member) * ROWS + row
    there = (member < GROUP) & (row < ROWS)
    plane = (jobs * tl.num_programs(1)).to(tl.int64) * heads * ROWS
    tl.store(sums_out + out, top, mask=there)
    tl.store(sums_out + plane + out, total, mask=there)
    tl.store(sums_out + 2 * plane + out, before, mask=there)
    tl.store(sums_out + 3 * plane + out, dot, mask=there)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def combine(
    sums_in,
    job_data,
    scales,
    sinks,
    top_out,
    log_out,
    entropy_out,
    splits,
    heads,
    jobs,
    ROWS,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    TILE: tl.constexpr,
    TILE_SPLITS: tl.constexpr,
):
    job = tl.program_id(1)
    line = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = line < heads * ROWS
    tokens = tl.load(job_data + job)
    own_splits = tl.cdiv(tokens, tl.load(job_data + 2 * jobs + job))
    unit = _unit(tl.load(scales + job), CAPPED)
    plane = (jobs * splits).to(tl.int64) * heads * ROWS
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    before = tl.zeros([TILE], tl.float32)
    dot = tl.zeros([TILE], tl.float32)
    for at in range(0, own_splits, TILE_SPLITS):
        split = at + tl.arange(0, TILE_SPLITS)
        place = (job * splits + split).to(tl.int64) * (heads * ROWS)
        where = sums_in + place[None, :] + line[:, None]
        mask = there[:, None] & (split < own_splits)[None, :]
        part_top = tl.load(where, mask=mask, other=float("-inf"))
        part_total = tl.load(where + plane, mask=mask, other=0.0)
        part_before = tl.load(where + 2 * plane, mask=mask, other=0.0)
        part_dot = tl.load(where + 3 * plane, mask=mask, other=0.0)
        top, safe, fall = _rise(top, tl.max(part_top, 1), unit)
        low, e = _relative(part_top, safe, unit)
        dot = (dot + fall * before) * tl.exp2(fall) + tl.sum((part_dot + low * part_before) * e, 1)
        total = total * tl.exp2(fall) + tl.sum(part_total * e, 1)
        before = before * tl.exp2(fall) + tl.sum(part_before * e, 1)
    if SINKS:
        sink = tl.load(sinks + job * heads + line // ROWS, mask=there, other=0.0)
        sink = sink.to(tl.float32) * (_LOG2E / unit)
        top, safe, fall = _rise(top, sink, unit)
        dot = (dot + fall * before) * tl.exp2(fall)
        total = total * tl.exp2(fall) + tl.exp2((sink - safe) * unit)
        before = before * tl.exp2(fall)
    total = tl.where(there, total, 1.0)
    log_total = tl.log2(total)
    # -sum p log2 p with log2 p = (logit - top) - log_total: both parts have one sign.
    entropy = tl.where(there, (log_total * before - dot) / total, 0.0)
    out = job.to(tl.int64) * (heads * ROWS) + line
    tl.store(top_out + out, top, mask=there)
    tl.store(log_out + out, log_total, mask=there)
    tl.store(entropy_out + out, entropy, mask=there)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def columns(
    queries,
    cache,
    table,
    job_data,
    scales,
    stride_job,
    stride_head,
    stride_row,
    stride_page,
    stride_kv_head,
    stride_token,
    stride_table,
    jobs,
    heads,
    soft_cap,
    top_in,
    log_in,
    mean_out,
    var_out,
    shift_out,
    width,
    GROUP: tl.constexpr,
    ROWS,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    CAPPED: tl.constexpr,
    OPERAND: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    FULL: tl.constexpr,
):
    CHUNKS: tl.constexpr = (GROUP + TILE_HEADS - 1) // TILE_HEADS
    head = tl.program_id(0) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    split = tl.program_id(1)
    job = tl.program_id(2)
    shift_out += (job * tl.num_programs(1) + split) * tl.num_programs(0) + tl.program_id(0)
    history = tl.load(job_data + jobs + job)
    share = tl.load(job_data + 2 * jobs + job)
    start = split * share
    if start >= history:
        tl.store(shift_out, 0.0)
        return
    stop = tl.minimum(start + share, history)
    scale = tl.load(scales + job)
    unit = _unit(scale, CAPPED)
    q = _query_tile(
        queries, job, head, stride_job, stride_head, stride_row, chunk,
        GROUP, ROWS, DIM, OPERAND, TILE_HEADS, TILE_ROWS, TILE_DIM,
    )  # fmt: skip
    cache += head.to(tl.int64) * stride_kv_head
    table += job.to(tl.int64) * stride_table
    line = tl.arange(0, TILE_HEADS * TILE_ROWS)
    line_member = chunk * TILE_HEADS + line // TILE_ROWS
    line_row = line % TILE_ROWS
    place = (job.to(tl.int64) * heads + head * GROUP + line_member) * ROWS + line_row
    there = (line_member < GROUP) & (line_row < ROWS)
    top = tl.load(top_in + place, mask=there, other=0.0)
    log_total = tl.load(log_in + place, mask=there, other=0.0)
    row = tl.arange(0, TILE_ROWS)
    member = chunk * TILE_HEADS + tl.arange(0, TILE_HEADS)
    outs = (job.to(tl.int64) * heads + head * GROUP + member) * width
    per_query = tl.div_rn(1.0, ROWS.to(tl.float32))
    per_degree = tl.div_rn(1.0, tl.maximum(ROWS - 1, 1).to(tl.float32))
    shift = tl.zeros([TILE_TOKENS, TILE_HEADS], tl.float32)
    pages = _pages(table, start, stop, PAGE, TILE_TOKENS)
    for at in tl.range(start, stop, TILE_TOKENS):
        k = _key_tile(
            cache, pages, at, stop, stride_page, stride_token,
            PAGE, DIM, OPERAND, TILE_TOKENS, TILE_DIM, True,
        )  # fmt: skip
        pages = _pages(table, at + TILE_TOKENS, stop, PAGE, TILE_TOKENS)
        # Tokens are the rows here, so that a column of the statistics lies within few threads.
        logits = _logits(k, tl.trans(q), scale, soft_cap, CAPPED)
        log_p = (logits - top[None, :]) * unit - log_total[None, :]
        p = tl.reshape(tl.exp2(log_p), (TILE_TOKENS, TILE_HEADS, TILE_ROWS))
        if not FULL:
            real = (row < ROWS)[None, None, :]
            p = tl.where(real, p, 0.0)
        mean = tl.sum(p, 2) * per_query
        deviation = p - mean[:, :, None]
        if not FULL:
            deviation = tl.where(real, deviation, 0.0)
        # Two passes: mean of squares minus squared mean cancels where p hardly varies.
        var = tl.sum(deviation * deviation, 2) * per_degree
        token = at + tl.arange(0, TILE_TOKENS)
        mask = (token < stop)[:, None] & (member < GROUP)[None, :]
        out = outs[None, :] + token[:, None]
        tl.store(mean_out + out, mean, mask=mask)
        tl.store(var_out + out, var, mask=mask)
        shift += tl.where(mask, var, 0.0)
    tl.store(shift_out, tl.sum(tl.sum(shift, 1), 0))
