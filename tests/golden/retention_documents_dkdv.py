# attn_engine golden | mask_mod_OnlineRetention: backward, dkdv | triton | block_q=32 block_kv=64
# regenerate: engine.source(backend="triton", kernel="dkdv")
# launch with num_warps=4, num_stages=2
# Q and dO: tensor descriptors of tiles, batch and head first
import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(32)
BLOCK_KV = tl.constexpr(64)
BLOCK_D = tl.constexpr(64)
BLOCK_DV = tl.constexpr(64)


@triton.jit
def load_tile(tiles, batch, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from `row` on of one batch and head, through a tensor descriptor: zeros past the end."""
    place = [tl.cast(batch, tl.int32), tl.cast(head, tl.int32), tl.cast(row, tl.int32), column]
    return tiles.load(place).reshape(ROWS, COLUMNS)


@triton.jit(do_not_specialize=[
    "saved_abs_sum_batch_stride", "saved_abs_sum_head_stride", "Delta_batch_stride",
    "Delta_head_stride", "scale", "heads", "kv_heads", "q_len", "kv_len", "documents_size_0"
])  # fmt: skip
def dkdv(
    Q, K, V, dO, saved_abs_sum, Delta, documents, q_documents_range, kv_documents_range, dK, dV,
    K_batch_stride, K_head_stride, K_row_stride, K_d_stride,
    V_batch_stride, V_head_stride, V_row_stride, V_d_stride,
    saved_abs_sum_batch_stride, saved_abs_sum_head_stride, saved_abs_sum_row_stride,
    Delta_batch_stride, Delta_head_stride, Delta_row_stride,
    documents_stride_0,
    q_documents_range_tile_stride, q_documents_range_end_stride,
    kv_documents_range_tile_stride, kv_documents_range_end_stride,
    dK_batch_stride, dK_head_stride, dK_row_stride, dK_d_stride,
    dV_batch_stride, dV_head_stride, dV_row_stride, dV_d_stride,
    scale, heads, kv_heads, q_len, kv_len,
    documents_size_0,
):  # fmt: skip
    q_tile = tl.arange(0, BLOCK_Q)
    kv_tile = tl.arange(0, BLOCK_KV)
    d_idx = tl.arange(0, BLOCK_D)
    dv_idx = tl.arange(0, BLOCK_DV)
    # heads come in sections that share a cache; in each of them the heavy tiles come first
    place = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    kv_start = tl.program_id(1) * BLOCK_KV
    kv_row = tl.cast(kv_start, tl.int64)
    kv_idx = kv_start + kv_tile
    kv_head = (place % kv_heads).to(tl.int64)
    batch = (place // kv_heads).to(tl.int64)

    # -- kv tile of this program
    K_base = K + batch * K_batch_stride + kv_head * K_head_stride + kv_row * K_row_stride
    key = tl.load(
        K_base + (kv_tile[:, None] * K_row_stride + d_idx[None, :] * K_d_stride),
        mask=kv_idx[:, None] < kv_len,
        other=0.0,
    )
    V_base = V + batch * V_batch_stride + kv_head * V_head_stride + kv_row * V_row_stride
    value = tl.load(
        V_base + (kv_tile[:, None] * V_row_stride + dv_idx[None, :] * V_d_stride),
        mask=kv_idx[:, None] < kv_len,
        other=0.0,
    )
    d_key = tl.full([BLOCK_KV, BLOCK_D], 0.0, tl.float32)
    d_value = tl.full([BLOCK_KV, BLOCK_DV], 0.0, tl.float32)

    # -- query heads that read this kv head
    group = heads // kv_heads
    first_head = kv_head * group
    for head in tl.range(first_head, first_head + group):
        documents_row = tl.load(
            documents + kv_idx * documents_stride_0, mask=kv_idx < documents_size_0, other=0
        )
        kv_documents_min = tl.load(
            kv_documents_range + tl.cast(kv_start // 64, tl.int64) * kv_documents_range_tile_stride
        ).to(tl.int32)
        kv_documents_max = tl.load(
            kv_documents_range
            + tl.cast(kv_start // 64, tl.int64) * kv_documents_range_tile_stride
            + kv_documents_range_end_stride,
        ).to(tl.int32)
        q_begin = tl.maximum(kv_start // 32 * 32, 0)
        q_end = tl.maximum((q_len + 31) // 32 * 32, q_begin)

        # -- q tiles in sight: none, some or all of the pairs visible
        for q_start in tl.range(q_begin, q_end, BLOCK_Q):
            q_row = tl.cast(q_start, tl.int64)
            q_idx = q_start + q_tile
            q_documents_min = tl.load(
                q_documents_range + tl.cast(q_start // 32, tl.int64) * q_documents_range_tile_stride
            ).to(tl.int32)
            q_documents_max = tl.load(
                q_documents_range
                + tl.cast(q_start // 32, tl.int64) * q_documents_range_tile_stride
                + q_documents_range_end_stride,
            ).to(tl.int32)
            if (q_documents_min <= kv_documents_max) & (kv_documents_min <= q_documents_max):
                query = load_tile(Q, batch, head, q_start, 0, BLOCK_Q, BLOCK_D)
                d_out = load_tile(dO, batch, head, q_start, 0, BLOCK_Q, BLOCK_DV)
                saved_abs_sum_base = (
                    saved_abs_sum
                    + batch * saved_abs_sum_batch_stride
                    + head * saved_abs_sum_head_stride
                    + q_row * saved_abs_sum_row_stride
                )
                abs_sum = tl.load(
                    saved_abs_sum_base + q_tile * saved_abs_sum_row_stride,
                    mask=q_idx < q_len,
                    other=0.0,
                )
                Delta_base = (
                    Delta
                    + batch * Delta_batch_stride
                    + head * Delta_head_stride
                    + q_row * Delta_row_stride
                )
                delta = tl.load(
                    Delta_base + q_tile * Delta_row_stride, mask=q_idx < q_len, other=0.0
                )
                score = tl.dot(key, query.T) * scale
                # test_golden.py:53: same_document = documents[q_idx] == documents[kv_idx]
                documents_value = tl.load(
                    documents + q_idx * documents_stride_0, mask=q_idx < documents_size_0, other=0
                )
                same_document = documents_value[None, :] == documents_row[:, None]
                visible = (
                    same_document & (kv_idx[:, None] <= q_idx[None, :]) & (q_idx[None, :] < q_len)
                )
                probs = tl.where(
                    visible, score / tl.where(abs_sum[None, :] < 1.0, 1.0, abs_sum[None, :]), 0.0
                )
                d_probs = tl.dot(value, d_out.T)
                # retention.py:41: through_sum = torch.where(total > 1, doosum * torch.sign(scor ...
                through_sum = tl.where(
                    1.0 < abs_sum[None, :],
                    delta[None, :] * ((0.0 < probs).to(tl.float32) - (probs < 0.0).to(tl.float32)),
                    0.0,
                )
                d_score = tl.where(
                    visible,
                    (d_probs - through_sum)
                    / tl.where(abs_sum[None, :] < 1.0, 1.0, abs_sum[None, :]),
                    0.0,
                )
                d_value = d_value + tl.dot(probs.to(V.dtype.element_ty), d_out)
                d_key = d_key + tl.dot(d_score.to(K.dtype.element_ty), query)

    # -- store
    dK_base = dK + batch * dK_batch_stride + kv_head * dK_head_stride + kv_row * dK_row_stride
    tl.store(
        dK_base + (kv_tile[:, None] * dK_row_stride + d_idx[None, :] * dK_d_stride),
        d_key * scale,
        mask=kv_idx[:, None] < kv_len,
    )
    dV_base = dV + batch * dV_batch_stride + kv_head * dV_head_stride + kv_row * dV_row_stride
    tl.store(
        dV_base + (kv_tile[:, None] * dV_row_stride + dv_idx[None, :] * dV_d_stride),
        d_value,
        mask=kv_idx[:, None] < kv_len,
    )
