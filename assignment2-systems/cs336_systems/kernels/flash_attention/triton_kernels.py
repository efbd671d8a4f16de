"""FlashAttention-2 in Triton: one kernel for the forward pass, three for the backward pass.

    S = Q Kᵀ / √d    P = softmax(S)    O = P V    L = log Σ exp(S)          D = rowsum(O ∘ dO)
    dV = Pᵀ dO       dP = dO Vᵀ        dS = P ∘ (dP - D)                    dQ = dS K / √d    dK = dSᵀ Q / √d

They compute what `reference` computes, tile by tile. Here each program owns one tile and loops over the others:

- `forward_kernel`: owns a tile of queries, loops over keys, writes O and L.
- `delta_kernel`: owns a tile of queries, writes D, and L in base 2.
- `dkdv_kernel`: owns a tile of keys, loops over queries, writes dK and dV.
- `dq_kernel`: owns a tile of queries, loops over keys, writes dQ.

Algorithm 2 of the paper computes dQ in the loop over keys as well, which saves two of seven matmuls but makes programs
add to the same dQ. Two kernels that share nothing are deterministic, and faster: the additions cost more than the
matmuls (see LOG.md).

All tensors are [batch heads sequence d] and are passed as tensor descriptors with blocks of [1 1 rows HEAD_DIM]:
Hopper's Tensor Memory Accelerator moves them, fills rows and columns beyond the tensor with zeros, and writes nothing
there.

Names: BLOCK_M and BLOCK_N, the queries and keys of a tile, are the paper's B_r and B_c. s is Q Kᵀ before any scaling;
m and l are m and ℓ, with m in base 2; delta is D. HEAD_DIM is d, rounded up to a power of two. `scale` is log₂e / √d,
so that exp(s / √d) = 2^(s · scale), because the hardware computes 2^x; and scale · ln 2 = 1 / √d again. PRECISION is
how matmuls are computed (`triton_ops.precision_of`); with "tf32x3" programs reload their own tiles (`_reload_tile`).

Lengths are not specialized: Triton would compile the kernels again for lengths that are 1 or multiples of 16, and the
kernels gain nothing from it.

Sources: Dao 2023, "FlashAttention-2" (arXiv 2307.08691), Algorithms 1 and 2; Milakov & Gimelshein 2018, "Online
normalizer calculation for softmax"; Ootomo & Yokota 2022 for three TF32 matmuls.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["n_queries", "n_keys", "heads", "group"])
def forward_kernel(
    Q, K, V, O, L, n_queries, n_keys, heads, group, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute O and L of one tile of queries.

    Args:
        Q, O: descriptors with blocks [1 1 BLOCK_M HEAD_DIM]. K, V: [1 1 BLOCK_N HEAD_DIM].
        L: [batch·heads n_queries] float32.
        group: query heads that share a head of K and V.
        scale: log₂e / √d.
    """
    tiles = tl.cdiv(n_queries, BLOCK_M)
    batch_head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if CAUSAL:  # the last queries have most keys to visit: start with the long programs
        tile = tiles - 1 - tile
    batch, head = batch_head // heads, batch_head % heads
    kv_head = head // group
    start = tile * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    q = _load(Q, batch, head, start, BLOCK_M, HEAD_DIM)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    # Keys that all queries of the tile see, in whole tiles; then those where a mask is needed.
    unmasked, end = _visible_keys(start, n_keys, BLOCK_M, BLOCK_N, CAUSAL)
    for j in tl.range(0, unmasked, BLOCK_N, num_stages=STAGES):
        o, m, l = _forward_step(o, m, l, q, Q, K, V, batch, head, kv_head, start, j, rows, n_keys, scale,
                                HEAD_DIM, BLOCK_N, CAUSAL, False, PRECISION)  # fmt: skip
    for j in tl.range(unmasked, end, BLOCK_N, num_stages=STAGES):
        o, m, l = _forward_step(o, m, l, q, Q, K, V, batch, head, kv_head, start, j, rows, n_keys, scale,
                                HEAD_DIM, BLOCK_N, CAUSAL, True, PRECISION)  # fmt: skip

    _store(O, batch, head, start, o / l[:, None], BLOCK_M, HEAD_DIM)
    # Back from base 2: L = ln 2 · (m + log₂ l).
    tl.store(L + batch_head.to(tl.int64) * n_queries + rows, (m + tl.log2(l)) * LN_2, mask=rows < n_queries)


@triton.jit
def _forward_step(
    o, m, l, q, Q, K, V, batch, head, kv_head, start, j, rows, n_keys, scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inner loop of Algorithm 1, for the keys from j on.

    Shapes: o [BLOCK_M HEAD_DIM], m and l [BLOCK_M], q [BLOCK_M HEAD_DIM]; s and p [BLOCK_M BLOCK_N].
    """
    k = _load(K, batch, kv_head, j, BLOCK_N, HEAD_DIM)
    q = _reload_tile(q, Q, batch, head, start, PRECISION)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        s = tl.where(_visible(rows[:, None], (j + tl.arange(0, BLOCK_N))[None, :], n_keys, CAUSAL), s, float("-inf"))
    # Every query sees key 0, so m is finite from the first tile on.
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    # Scaled here, not before the maximum: multiplying and subtracting are one instruction.
    p = tl.exp2(s * scale - m_new[:, None])
    rescale = tl.exp2(m - m_new)
    v = _load(V, batch, kv_head, j, BLOCK_N, HEAD_DIM)
    o = tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision=PRECISION)
    return o, m_new, l * rescale + tl.sum(p, 1)


@triton.jit(do_not_specialize=["n_queries", "padded", "heads"])
def delta_kernel(O, dO, L, delta, log2_L, n_queries, padded, heads, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr):
    """Compute D = rowsum(O ∘ dO) and L log₂e of one tile of queries, 0 beyond the last query.

    L is [batch·heads n_queries]; delta and log2_L are [batch·heads padded], whole tiles, so that the kernels below
    read them without a mask.
    """
    tiles = tl.cdiv(n_queries, BLOCK_M)
    batch_head, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    batch, head = batch_head // heads, batch_head % heads
    o = _load(O, batch, head, start, BLOCK_M, HEAD_DIM).to(tl.float32)
    do = _load(dO, batch, head, start, BLOCK_M, HEAD_DIM).to(tl.float32)
    rows = start + tl.arange(0, BLOCK_M)
    l = tl.load(L + batch_head.to(tl.int64) * n_queries + rows, mask=rows < n_queries, other=0.0)
    at = batch_head.to(tl.int64) * padded + rows
    tl.store(delta + at, tl.sum(o * do, 1))
    tl.store(log2_L + at, l * LOG2_E)


@triton.jit(do_not_specialize=["n_queries", "padded", "n_keys", "heads", "group"])
def dkdv_kernel(
    Q, K, V, dO, log2_L, delta, dK, dV, n_queries, padded, n_keys, heads, group, scale,
    GROUPED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WAIT_FOR_DOTS: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV of one tile of keys; `heads` counts heads of keys here.

    Scores are transposed, [BLOCK_N BLOCK_M], so that Pᵀ and dSᵀ are left operands of the matmuls for dV and dK and stay
    in registers. Rows beyond n_keys hold arbitrary values, which nothing reads.
    """
    tiles = tl.cdiv(n_keys, BLOCK_N)
    batch_head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, kv_head = batch_head // heads, batch_head % heads
    start = tile * BLOCK_N
    keys = start + tl.arange(0, BLOCK_N)
    k = _load(K, batch, kv_head, start, BLOCK_N, HEAD_DIM)
    v = _load(V, batch, kv_head, start, BLOCK_N, HEAD_DIM)
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)

    if not GROUPED:  # a single head needs no loop: nested loops cost registers
        dk, dv = _dkdv_of_head(dk, dv, k, v, Q, K, V, dO, log2_L, delta, batch, kv_head, kv_head, heads, keys, start,
                               n_queries, padded, scale, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, CAUSAL, PRECISION,
                               WAIT_FOR_DOTS)  # fmt: skip
    else:
        for head in range(kv_head * group, kv_head * group + group):
            dk, dv = _dkdv_of_head(dk, dv, k, v, Q, K, V, dO, log2_L, delta, batch, kv_head, head, heads * group, keys,
                                   start, n_queries, padded, scale, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, CAUSAL,
                                   PRECISION, WAIT_FOR_DOTS)  # fmt: skip

    _store(dK, batch, kv_head, start, dk * (scale * LN_2), BLOCK_N, HEAD_DIM)  # scale · ln 2 = 1 / √d
    _store(dV, batch, kv_head, start, dv, BLOCK_N, HEAD_DIM)


@triton.jit
def _dkdv_of_head(
    dk, dv, k, v, Q, K, V, dO, log2_L, delta, batch, kv_head, head, heads, keys, start, n_queries, padded, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WAIT_FOR_DOTS: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the queries of one head to dk and dv [BLOCK_N HEAD_DIM]."""
    at = (batch * heads + head).to(tl.int64) * padded
    # Queries before the first key see nothing of the tile; queries from its last key on see all of it.
    first, unmasked = 0, 0
    if CAUSAL:
        first = start // BLOCK_M * BLOCK_M
        unmasked = tl.minimum(tl.cdiv(start + BLOCK_N - 1, BLOCK_M) * BLOCK_M, n_queries)
    for i in tl.range(first, unmasked, BLOCK_M, num_stages=STAGES):
        dk, dv = _dkdv_step(dk, dv, k, v, Q, K, V, dO, log2_L + at, delta + at, batch, head, kv_head, start, i, keys,
                            scale, HEAD_DIM, BLOCK_M, True, PRECISION, WAIT_FOR_DOTS)  # fmt: skip
    for i in tl.range(unmasked, n_queries, BLOCK_M, num_stages=STAGES):
        dk, dv = _dkdv_step(dk, dv, k, v, Q, K, V, dO, log2_L + at, delta + at, batch, head, kv_head, start, i, keys,
                            scale, HEAD_DIM, BLOCK_M, False, PRECISION, WAIT_FOR_DOTS)  # fmt: skip
    return dk, dv


@triton.jit
def _dkdv_step(
    dk, dv, k, v, Q, K, V, dO, log2_L, delta, batch, head, kv_head, start, i, keys, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    WAIT_FOR_DOTS: tl.constexpr,
):  # fmt: skip
    """The inner loop of Algorithm 2 without dQ, for the queries from i on.

    Shapes: dk, dv, k and v [BLOCK_N HEAD_DIM]; s, p, dp and ds, all transposed, [BLOCK_N BLOCK_M]. Queries beyond the
    last need no mask: their dO, Q and delta are 0, and so is their contribution.
    """
    rows = i + tl.arange(0, BLOCK_M)
    q = _load(Q, batch, head, i, BLOCK_M, HEAD_DIM)
    log2_l = tl.load(log2_L + rows)
    do = _load(dO, batch, head, i, BLOCK_M, HEAD_DIM)
    delta_i = tl.load(delta + rows)
    k = _reload_tile(k, K, batch, kv_head, start, PRECISION)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    v = _reload_tile(v, V, batch, kv_head, start, PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    p = tl.exp2(s * scale - log2_l[None, :])
    if MASKED:
        p = tl.where(rows[None, :] >= keys[:, None], p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (dp - delta_i[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if WAIT_FOR_DOTS:
        dk, dv = _wait_for_dots(dk), _wait_for_dots(dv)
    return dk, dv


@triton.jit(do_not_specialize=["n_queries", "padded", "n_keys", "heads", "group"])
def dq_kernel(
    Q, K, V, dO, log2_L, delta, dQ, n_queries, padded, n_keys, heads, group, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dQ of one tile of queries."""
    tiles = tl.cdiv(n_queries, BLOCK_M)
    batch_head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    batch, head = batch_head // heads, batch_head % heads
    kv_head = head // group
    start = tile * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    at = batch_head.to(tl.int64) * padded + rows
    q = _load(Q, batch, head, start, BLOCK_M, HEAD_DIM)
    do = _load(dO, batch, head, start, BLOCK_M, HEAD_DIM)
    log2_l = tl.load(log2_L + at)
    delta_i = tl.load(delta + at)
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    unmasked, end = _visible_keys(start, n_keys, BLOCK_M, BLOCK_N, CAUSAL)
    for j in tl.range(0, unmasked, BLOCK_N, num_stages=STAGES):
        dq = _dq_step(dq, q, do, log2_l, delta_i, Q, K, V, dO, batch, head, kv_head, start, j, rows, n_keys, scale,
                      HEAD_DIM, BLOCK_N, CAUSAL, False, PRECISION)  # fmt: skip
    for j in tl.range(unmasked, end, BLOCK_N, num_stages=STAGES):
        dq = _dq_step(dq, q, do, log2_l, delta_i, Q, K, V, dO, batch, head, kv_head, start, j, rows, n_keys, scale,
                      HEAD_DIM, BLOCK_N, CAUSAL, True, PRECISION)  # fmt: skip

    _store(dQ, batch, head, start, dq * (scale * LN_2), BLOCK_M, HEAD_DIM)


@triton.jit
def _dq_step(
    dq, q, do, log2_l, delta_i, Q, K, V, dO, batch, head, kv_head, start, j, rows, n_keys, scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the keys from j on to dq [BLOCK_M HEAD_DIM]; s, p, dp and ds are [BLOCK_M BLOCK_N]."""
    k = _load(K, batch, kv_head, j, BLOCK_N, HEAD_DIM)
    if PRECISION != "tf32x3":
        v = _load(V, batch, kv_head, j, BLOCK_N, HEAD_DIM)
    q = _reload_tile(q, Q, batch, head, start, PRECISION)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if PRECISION == "tf32x3":  # loaded this late, it leaves registers to the matmul above
        v = _load(V, batch, kv_head, j, BLOCK_N, HEAD_DIM)
    do = _reload_tile(do, dO, batch, head, start, PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    p = tl.exp2(s * scale - log2_l[:, None])
    if MASKED:
        p = tl.where(_visible(rows[:, None], (j + tl.arange(0, BLOCK_N))[None, :], n_keys, CAUSAL), p, 0.0)
    ds = p * (dp - delta_i[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _reload_tile(x, X, batch, head, start, PRECISION: tl.constexpr):
    """Return the program's own tile `x` of `X`, right before a matmul that uses it.

    For three TF32 matmuls it is loaded again in each iteration of the loop, from the L2 cache: the two parts into which
    it is split would otherwise stay in registers from the first iteration to the last, and there are none to spare.
    """
    if PRECISION == "tf32x3":
        return _load(X, batch, head, start, x.shape[0], x.shape[1])
    return x


@triton.jit
def _visible_keys(start, n_keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Count the keys that the tile of queries from `start` on sees: without a mask (in whole tiles), and in total."""
    if CAUSAL:
        return tl.minimum(start, n_keys) // BLOCK_N * BLOCK_N, tl.minimum(start + BLOCK_M, n_keys)
    return n_keys // BLOCK_N * BLOCK_N, n_keys


@triton.jit
def _visible(rows, keys, n_keys, CAUSAL: tl.constexpr):
    inside = keys < n_keys
    if CAUSAL:
        inside = inside & (rows >= keys)
    return inside


@triton.jit
def _load(X, batch, head, row, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    return X.load([batch, head, row, 0]).reshape(ROWS, HEAD_DIM)


@triton.jit
def _store(X, batch, head, row, x, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    X.store([batch, head, row, 0], x.to(X.dtype).reshape(1, 1, ROWS, HEAD_DIM))


@triton.jit
def _wait_for_dots(x):
    """Return x after reading it, so that the matmuls that accumulate into it are waited for here.

    If they are still in flight at the end of an iteration, ptxas inserts a wait after each wgmma of the loop.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
