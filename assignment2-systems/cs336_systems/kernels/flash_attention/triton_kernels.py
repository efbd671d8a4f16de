"""FlashAttention-2 in Triton: one kernel for the forward pass, three for the backward pass.

They compute what `reference` computes, tile by tile; here a program owns one tile and loops over the others:

- `forward_kernel`: a tile of queries, loops over keys; writes O and L.
- `delta_kernel`: a tile of queries; D = rowsum(O ∘ dO), and L in base 2.
- `dkdv_kernel`: a tile of keys, loops over queries; writes dK and dV.
- `dq_kernel`: a tile of queries, loops over keys; writes dQ.

Algorithm 2 of the paper computes dQ in the loop over keys too, which saves two of seven products but makes
programs add to the same dQ. Two kernels without sharing are deterministic, and faster: the additions cost more
than the products (see LOG.md).

All tensors are [batch heads sequence d] and come as tensor descriptors with blocks of [1 1 rows WIDTH]: Hopper's Tensor
Memory Accelerator moves them, fills rows and columns beyond the tensor with zeros, and writes none there.

Names, here and in the paper: QUERIES and KEYS are B_r and B_c; s is Q Kᵀ before any scaling; m and l are m and ℓ,
with m in base 2; delta is D = rowsum(O ∘ dO); WIDTH is d, rounded up to a power of two. `scale` is log₂e / √d, so
that exp(s / √d) = 2^(s · scale), for 2^x is what the hardware computes; and scale · ln 2 = 1 / √d again. PRECISION: how
products are computed (`triton_ops.precision_of`); with "tf32x3" programs read their own tiles anew (`_own`).

Lengths are not specialised: Triton would compile the kernels anew for those that are 1 or multiples of 16, and nothing
here gains by it.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["n_queries", "n_keys", "heads", "group"])
def forward_kernel(
    Q, K, V, O, L, n_queries, n_keys, heads, group, scale,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O and L of one tile of queries.

    Args:
        Q, O: descriptors with blocks [1 1 QUERIES WIDTH]. K, V: [1 1 KEYS WIDTH].
        L: [batch·heads n_queries] float32.
        group: query heads that share a head of K and V.
        scale: log₂e / √d.
    """
    tiles = tl.cdiv(n_queries, QUERIES)
    batch_head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if CAUSAL:  # the last queries have most keys to visit: begin with the long jobs
        tile = tiles - 1 - tile
    batch, head = batch_head // heads, batch_head % heads
    kv_head = head // group
    start = tile * QUERIES
    rows = start + tl.arange(0, QUERIES)
    q = _load(Q, batch, head, start, QUERIES, WIDTH)
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    l = tl.zeros([QUERIES], tl.float32)
    o = tl.zeros([QUERIES, WIDTH], tl.float32)

    # Keys that all queries of the tile see, in whole tiles; then those where a mask is needed.
    unmasked, end = _visible_keys(start, n_keys, QUERIES, KEYS, CAUSAL)
    for j in tl.range(0, unmasked, KEYS, num_stages=STAGES):
        o, m, l = _forward_step(o, m, l, q, Q, K, V, batch, head, kv_head, start, j, rows, n_keys, scale,
                                WIDTH, KEYS, CAUSAL, False, PRECISION)  # fmt: skip
    for j in tl.range(unmasked, end, KEYS, num_stages=STAGES):
        o, m, l = _forward_step(o, m, l, q, Q, K, V, batch, head, kv_head, start, j, rows, n_keys, scale,
                                WIDTH, KEYS, CAUSAL, True, PRECISION)  # fmt: skip

    _store(O, batch, head, start, o / l[:, None], QUERIES, WIDTH)
    # Back from base 2: L = ln 2 · (m + log₂ l).
    tl.store(L + batch_head.to(tl.int64) * n_queries + rows, (m + tl.log2(l)) * LN_2, mask=rows < n_queries)


@triton.jit
def _forward_step(
    o, m, l, q, Q, K, V, batch, head, kv_head, start, j, rows, n_keys, scale,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inner loop of Algorithm 1: the keys from j on."""
    k = _load(K, batch, kv_head, j, KEYS, WIDTH)
    q = _own(q, Q, batch, head, start, PRECISION)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        s = tl.where(_visible(rows[:, None], (j + tl.arange(0, KEYS))[None, :], n_keys, CAUSAL), s, float("-inf"))
    # Every query sees key 0, so m is finite from the first tile on.
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    # Scaled here, not before the maximum: multiplying and subtracting are one instruction.
    p = tl.exp2(s * scale - m_new[:, None])
    rescale = tl.exp2(m - m_new)
    v = _load(V, batch, kv_head, j, KEYS, WIDTH)
    o = tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision=PRECISION)
    return o, m_new, l * rescale + tl.sum(p, 1)


@triton.jit(do_not_specialize=["n_queries", "padded", "heads"])
def delta_kernel(O, dO, L, delta, log2_L, n_queries, padded, heads, WIDTH: tl.constexpr, QUERIES: tl.constexpr):
    """D = rowsum(O ∘ dO) and L log₂e of one tile of queries, 0 beyond the last query.

    L is [batch·heads n_queries]; delta and log2_L are [batch·heads padded], whole tiles, so that the kernels below
    read them without a mask.
    """
    tiles = tl.cdiv(n_queries, QUERIES)
    batch_head, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * QUERIES
    batch, head = batch_head // heads, batch_head % heads
    o = _load(O, batch, head, start, QUERIES, WIDTH).to(tl.float32)
    do = _load(dO, batch, head, start, QUERIES, WIDTH).to(tl.float32)
    rows = start + tl.arange(0, QUERIES)
    l = tl.load(L + batch_head.to(tl.int64) * n_queries + rows, mask=rows < n_queries, other=0.0)
    at = batch_head.to(tl.int64) * padded + rows
    tl.store(delta + at, tl.sum(o * do, 1))
    tl.store(log2_L + at, l * LOG2_E)


@triton.jit(do_not_specialize=["n_queries", "padded", "n_keys", "heads", "group"])
def dkdv_kernel(
    Q, K, V, dO, log2_L, delta, dK, dV, n_queries, padded, n_keys, heads, group, scale,
    GROUPED: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, SETTLE: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys; `heads` counts heads of keys here.

    Scores are transposed, [KEYS QUERIES]: so Pᵀ and dSᵀ are left operands of the products for dV and dK, and stay
    in registers. Rows of keys beyond n_keys hold nonsense, which nothing reads.
    """
    tiles = tl.cdiv(n_keys, KEYS)
    batch_head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, kv_head = batch_head // heads, batch_head % heads
    start = tile * KEYS
    keys = start + tl.arange(0, KEYS)
    k = _load(K, batch, kv_head, start, KEYS, WIDTH)
    v = _load(V, batch, kv_head, start, KEYS, WIDTH)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)

    if not GROUPED:  # no loop over a single head: nested loops cost registers
        dk, dv = _dkdv_of_head(dk, dv, k, v, Q, K, V, dO, log2_L, delta, batch, kv_head, kv_head, heads, keys, start,
                               n_queries, padded, scale, WIDTH, QUERIES, KEYS, STAGES, CAUSAL, PRECISION,
                               SETTLE)  # fmt: skip
    else:
        for head in range(kv_head * group, kv_head * group + group):
            dk, dv = _dkdv_of_head(dk, dv, k, v, Q, K, V, dO, log2_L, delta, batch, kv_head, head, heads * group, keys,
                                   start, n_queries, padded, scale, WIDTH, QUERIES, KEYS, STAGES, CAUSAL, PRECISION,
                                   SETTLE)  # fmt: skip

    _store(dK, batch, kv_head, start, dk * (scale * LN_2), KEYS, WIDTH)  # scale · ln 2 = 1 / √d
    _store(dV, batch, kv_head, start, dv, KEYS, WIDTH)


@triton.jit
def _dkdv_of_head(
    dk, dv, k, v, Q, K, V, dO, log2_L, delta, batch, kv_head, head, heads, keys, start, n_queries, padded, scale,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, SETTLE: tl.constexpr,
):  # fmt: skip
    """Add what the queries of one head contribute."""
    at = (batch * heads + head).to(tl.int64) * padded
    # Queries before the first key see nothing of the tile, those from its last key on see all of it.
    first, unmasked = 0, 0
    if CAUSAL:
        first = start // QUERIES * QUERIES
        unmasked = tl.minimum(tl.cdiv(start + KEYS - 1, QUERIES) * QUERIES, n_queries)
    for i in tl.range(first, unmasked, QUERIES, num_stages=STAGES):
        dk, dv = _dkdv_step(dk, dv, k, v, Q, K, V, dO, log2_L + at, delta + at, batch, head, kv_head, start, i, keys,
                            scale, WIDTH, QUERIES, True, PRECISION, SETTLE)  # fmt: skip
    for i in tl.range(unmasked, n_queries, QUERIES, num_stages=STAGES):
        dk, dv = _dkdv_step(dk, dv, k, v, Q, K, V, dO, log2_L + at, delta + at, batch, head, kv_head, start, i, keys,
                            scale, WIDTH, QUERIES, False, PRECISION, SETTLE)  # fmt: skip
    return dk, dv


@triton.jit
def _dkdv_step(
    dk, dv, k, v, Q, K, V, dO, log2_L, delta, batch, head, kv_head, start, i, keys, scale,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, SETTLE: tl.constexpr,
):  # fmt: skip
    """The inner loop of Algorithm 2 without dQ: the queries from i on.

    Those beyond the last need no mask: their dO, Q and delta are 0, and so is what they add.
    """
    rows = i + tl.arange(0, QUERIES)
    q = _load(Q, batch, head, i, QUERIES, WIDTH)
    log2_l = tl.load(log2_L + rows)
    do = _load(dO, batch, head, i, QUERIES, WIDTH)
    delta_i = tl.load(delta + rows)
    k = _own(k, K, batch, kv_head, start, PRECISION)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    v = _own(v, V, batch, kv_head, start, PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    p = tl.exp2(s * scale - log2_l[None, :])
    if MASKED:
        p = tl.where(rows[None, :] >= keys[:, None], p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (dp - delta_i[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if SETTLE:
        dk, dv = _settle(dk), _settle(dv)
    return dk, dv


@triton.jit(do_not_specialize=["n_queries", "padded", "n_keys", "heads", "group"])
def dq_kernel(
    Q, K, V, dO, log2_L, delta, dQ, n_queries, padded, n_keys, heads, group, scale,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries."""
    tiles = tl.cdiv(n_queries, QUERIES)
    batch_head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    batch, head = batch_head // heads, batch_head % heads
    kv_head = head // group
    start = tile * QUERIES
    rows = start + tl.arange(0, QUERIES)
    at = batch_head.to(tl.int64) * padded + rows
    q = _load(Q, batch, head, start, QUERIES, WIDTH)
    do = _load(dO, batch, head, start, QUERIES, WIDTH)
    log2_l = tl.load(log2_L + at)
    delta_i = tl.load(delta + at)
    dq = tl.zeros([QUERIES, WIDTH], tl.float32)

    unmasked, end = _visible_keys(start, n_keys, QUERIES, KEYS, CAUSAL)
    for j in tl.range(0, unmasked, KEYS, num_stages=STAGES):
        dq = _dq_step(dq, q, do, log2_l, delta_i, Q, K, V, dO, batch, head, kv_head, start, j, rows, n_keys, scale,
                      WIDTH, KEYS, CAUSAL, False, PRECISION)  # fmt: skip
    for j in tl.range(unmasked, end, KEYS, num_stages=STAGES):
        dq = _dq_step(dq, q, do, log2_l, delta_i, Q, K, V, dO, batch, head, kv_head, start, j, rows, n_keys, scale,
                      WIDTH, KEYS, CAUSAL, True, PRECISION)  # fmt: skip

    _store(dQ, batch, head, start, dq * (scale * LN_2), QUERIES, WIDTH)


@triton.jit
def _dq_step(
    dq, q, do, log2_l, delta_i, Q, K, V, dO, batch, head, kv_head, start, j, rows, n_keys, scale,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the keys from j on add to dQ."""
    k = _load(K, batch, kv_head, j, KEYS, WIDTH)
    if PRECISION != "tf32x3":
        v = _load(V, batch, kv_head, j, KEYS, WIDTH)
    q = _own(q, Q, batch, head, start, PRECISION)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if PRECISION == "tf32x3":  # read this late, it leaves registers to the product above
        v = _load(V, batch, kv_head, j, KEYS, WIDTH)
    do = _own(do, dO, batch, head, start, PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    p = tl.exp2(s * scale - log2_l[:, None])
    if MASKED:
        p = tl.where(_visible(rows[:, None], (j + tl.arange(0, KEYS))[None, :], n_keys, CAUSAL), p, 0.0)
    ds = p * (dp - delta_i[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _own(x, X, batch, head, start, PRECISION: tl.constexpr):
    """The program's own tile `x` of `X`, right before a product of it.

    For three TF32 products it is read anew in each round of the loop, from the L2 cache: the two parts into which they
    split it would otherwise stay in registers from the first round to the last, and there are none to spare.
    """
    if PRECISION == "tf32x3":
        return _load(X, batch, head, start, x.shape[0], x.shape[1])
    return x


@triton.jit
def _visible_keys(start, n_keys, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr):
    """How many keys the tile of queries from `start` on sees: without a mask (in whole tiles), and at all."""
    if CAUSAL:
        return tl.minimum(start, n_keys) // KEYS * KEYS, tl.minimum(start + QUERIES, n_keys)
    return n_keys // KEYS * KEYS, n_keys


@triton.jit
def _visible(rows, keys, n_keys, CAUSAL: tl.constexpr):
    inside = keys < n_keys
    if CAUSAL:
        inside = inside & (rows >= keys)
    return inside


@triton.jit
def _load(X, batch, head, row, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return X.load([batch, head, row, 0]).reshape(ROWS, WIDTH)


@triton.jit
def _store(X, batch, head, row, x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    X.store([batch, head, row, 0], x.to(X.dtype).reshape(1, 1, ROWS, WIDTH))


@triton.jit
def _settle(x):
    """x itself, but read: so that the matrix products that sum into it are waited for here.

    Left in flight over the edge of the loop, they make ptxas put a wait after each wgmma of it.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
