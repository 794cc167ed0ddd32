# attn_engine golden | mask_mod_OnlineRetention: forward | triton | block_q=128 block_kv=64
# regenerate: engine.source(backend="triton", kernel="forward")
# launch with num_warps=8, num_stages=2
# K and V: tensor descriptors of tiles, batch and head first
import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(128)
BLOCK_KV = tl.constexpr(64)
BLOCK_D = tl.constexpr(64)
BLOCK_DV = tl.constexpr(64)


@triton.jit
def load_tile(tiles, batch, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from `row` on of one batch and head, through a tensor descriptor: zeros past the end."""
    place = [tl.cast(batch, tl.int32), tl.cast(head, tl.int32), tl.cast(row, tl.int32), column]
    return tiles.load(place).reshape(ROWS, COLUMNS)


@triton.jit(do_not_specialize=[
    "saved_abs_sum_batch_stride", "saved_abs_sum_head_stride", "scale", "heads", "kv_heads",
    "q_len", "kv_len", "documents_size_0"
])  # fmt: skip
def forward(
    Q, K, V, documents, q_documents_range, kv_documents_range, O, saved_abs_sum,
    Q_batch_stride, Q_head_stride, Q_row_stride, Q_d_stride,
    documents_stride_0,
    q_documents_range_tile_stride, q_documents_range_end_stride,
    kv_documents_range_tile_stride, kv_documents_range_end_stride,
    O_batch_stride, O_head_stride, O_row_stride, O_d_stride,
    saved_abs_sum_batch_stride, saved_abs_sum_head_stride, saved_abs_sum_row_stride,
    scale, heads, kv_heads, q_len, kv_len,
    documents_size_0,
):  # fmt: skip
    q_tile = tl.arange(0, BLOCK_Q)
    kv_tile = tl.arange(0, BLOCK_KV)
    d_idx = tl.arange(0, BLOCK_D)
    dv_idx = tl.arange(0, BLOCK_DV)
    # heads come in sections that share a cache; in each of them the heavy tiles come first
    place = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    q_start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q
    q_row = tl.cast(q_start, tl.int64)
    q_idx = q_start + q_tile
    head = (place % heads).to(tl.int64)
    batch = (place // heads).to(tl.int64)

    # -- query tile of this program
    kv_head = head // (heads // kv_heads)
    Q_base = Q + batch * Q_batch_stride + head * Q_head_stride + q_row * Q_row_stride
    query = tl.load(
        Q_base + (q_tile[:, None] * Q_row_stride + d_idx[None, :] * Q_d_stride),
        mask=q_idx[:, None] < q_len,
        other=0.0,
    )
    documents_row = tl.load(
        documents + q_idx * documents_stride_0, mask=q_idx < documents_size_0, other=0
    )

    # -- row state of OnlineRetention
    row_abs_sum = tl.full([BLOCK_Q], 0.0, tl.float32)
    out = tl.full([BLOCK_Q, BLOCK_DV], 0.0, tl.float32)

    # -- kv tiles this tile can see
    q_last = tl.minimum(q_start + 127, q_len - 1)
    q_documents_min = tl.load(
        q_documents_range + tl.cast(q_start // 128, tl.int64) * q_documents_range_tile_stride
    ).to(tl.int32)
    q_documents_max = tl.load(
        q_documents_range
        + tl.cast(q_start // 128, tl.int64) * q_documents_range_tile_stride
        + q_documents_range_end_stride,
    ).to(tl.int32)
    kv_begin = 0
    kv_end = tl.maximum((tl.minimum(q_last + 1, kv_len) + 63) // 64 * 64, kv_begin)

    # -- kv tiles in sight: none, some or all of the pairs visible
    for kv_start in tl.range(kv_begin, kv_end, BLOCK_KV):
        kv_idx = kv_start + kv_tile
        kv_documents_min = tl.load(
            kv_documents_range + tl.cast(kv_start // 64, tl.int64) * kv_documents_range_tile_stride
        ).to(tl.int32)
        kv_documents_max = tl.load(
            kv_documents_range
            + tl.cast(kv_start // 64, tl.int64) * kv_documents_range_tile_stride
            + kv_documents_range_end_stride,
        ).to(tl.int32)
        if (q_documents_min <= kv_documents_max) & (kv_documents_min <= q_documents_max):
            key = load_tile(K, batch, kv_head, kv_start, 0, BLOCK_KV, BLOCK_D)
            value = load_tile(V, batch, kv_head, kv_start, 0, BLOCK_KV, BLOCK_DV)
            score = tl.dot(query, key.T) * scale
            # test_golden.py:53: same_document = documents[q_idx] == documents[kv_idx]
            documents_value = tl.load(
                documents + kv_idx * documents_stride_0, mask=kv_idx < documents_size_0, other=0
            )
            same_document = documents_row[:, None] == documents_value[None, :]
            visible = (
                same_document & (kv_idx[None, :] <= q_idx[:, None]) & (kv_idx[None, :] < kv_len)
            )
            probs = tl.where(visible, score, 0.0)
            # retention.py:24: new_sum = online_rowscales["row_abs_sum"] + scores.get_reduce("ab ...
            new_sum = row_abs_sum + tl.sum(tl.where(visible, tl.abs(probs), 0.0), axis=1)
            out = out + tl.dot(probs.to(V.dtype), value)
            row_abs_sum = new_sum

    # -- normalise and store
    O_base = O + batch * O_batch_stride + head * O_head_stride + q_row * O_row_stride
    tl.store(
        O_base + (q_tile[:, None] * O_row_stride + dv_idx[None, :] * O_d_stride),
        out / tl.where(row_abs_sum[:, None] < 1.0, 1.0, row_abs_sum[:, None]),
        mask=q_idx[:, None] < q_len,
    )
    saved_abs_sum_base = (
        saved_abs_sum
        + batch * saved_abs_sum_batch_stride
        + head * saved_abs_sum_head_stride
        + q_row * saved_abs_sum_row_stride
    )
    tl.store(
        saved_abs_sum_base + q_tile * saved_abs_sum_row_stride, row_abs_sum, mask=q_idx < q_len
    )
