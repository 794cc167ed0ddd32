# attn_engine golden | select_weighed_causal_mask_Importance: select | triton
# rows of a tile are the query heads that share a kv head
# launch with num_warps=8, num_stages=2
import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(64)
BLOCK_KV = tl.constexpr(128)
BLOCK_D = tl.constexpr(128)


@triton.jit
def floor_divide(a, b):
    """a // b, rounded toward minus infinity."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), a // b - 1, a // b)


SHARE_WORDS = tl.constexpr(4)
LOWEST = tl.constexpr(-2147483648)


@triton.jit
def order_of(x):
    """Integers in the order of the numbers that they stand for; 0 and -0 are the same, and -inf and NaN the lowest."""
    bits = x.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x > float("-inf"), tl.where(order == -1, 0, order), LOWEST)


@triton.jit
def begin_row(row, share, first_key):
    """Nothing has been offered to this share yet; the first tile of it begins at first_key."""
    tl.store(row + share * SHARE_WORDS, first_key)
    tl.store(row + share * SHARE_WORDS + 1, 0)
    tl.store(row + share * SHARE_WORDS + 2, 0)


@triton.jit
def offer_tile(row, share, shares, first, importance):
    """The importances of the keys first, first + 1, ...; those of -inf and NaN are no candidates."""
    BLOCK: tl.constexpr = importance.shape[0]
    tl.store(row + shares * SHARE_WORDS + first + tl.arange(0, BLOCK), order_of(importance))
    tl.store(row + share * SHARE_WORDS + 1, first + BLOCK)


@triton.jit(do_not_specialize=[
    "scale", "tokens", "first_tile", "tile_tokens", "splits", "kv_heads", "q_len", "kv_len",
    "w_size_0", "w_size_1", "w_size_2"
])  # fmt: skip
def select(
    Q, K, w, candidates,
    Q_batch_stride, Q_token_stride, Q_head_stride, Q_row_stride, Q_d_stride,
    K_batch_stride, K_head_stride, K_row_stride, K_d_stride,
    w_stride_0, w_stride_1, w_stride_2,
    candidates_batch_stride, candidates_head_stride, candidates_row_stride,
    scale, tokens, first_tile, tile_tokens, splits, kv_heads, q_len, kv_len,
    w_size_0, w_size_1, w_size_2,
):  # fmt: skip
    q_tile = tl.arange(0, BLOCK_Q)
    kv_tile = tl.arange(0, BLOCK_KV)
    d_idx = tl.arange(0, BLOCK_D)
    split = tl.program_id(0)
    tile = tl.program_id(1)
    kv_head = (tl.program_id(2) % kv_heads).to(tl.int64)
    batch = (tl.program_id(2) // kv_heads).to(tl.int64)

    # -- tokens of this program
    first_token = (first_tile + tile) * tile_tokens
    token_end = tl.minimum(first_token + tile_tokens, tokens)
    if first_token < token_end:

        # -- kv tiles that these tokens can see
        last_token = token_end - 1
        kv_begin = 0
        kv_end = tl.maximum(
            floor_divide(tl.minimum(last_token + 1, kv_len) + 127, 128) * 128, kv_begin
        )
        kv_tiles = floor_divide(kv_end - kv_begin, 128)
        tiles_per_split = floor_divide(kv_tiles + splits - 1, splits)
        split_begin = kv_begin + split * tiles_per_split * 128
        split_end = tl.minimum(split_begin + tiles_per_split * 128, kv_end)
        for token in tl.range(first_token, token_end):
            candidates_row = (
                candidates
                + batch * candidates_batch_stride
                + kv_head * candidates_head_stride
                + tl.cast(tile * tile_tokens + (token - first_token), tl.int64)
                * candidates_row_stride
            )
            begin_row(candidates_row, split, split_begin)

        # -- importances, tile by tile
        for kv_start in tl.range(split_begin, split_end, BLOCK_KV):
            kv_row = tl.cast(kv_start, tl.int64)
            kv_idx = kv_start + kv_tile
            K_base = K + batch * K_batch_stride + kv_head * K_head_stride + kv_row * K_row_stride
            key = tl.load(
                K_base + (kv_tile[:, None] * K_row_stride + d_idx[None, :] * K_d_stride),
                mask=kv_idx[:, None] < kv_len,
                other=0.0,
            )
            for token in tl.range(first_token, token_end):
                importance = tl.full([BLOCK_KV], 0.0, tl.float32)
                q_start = 0
                q_row = tl.cast(q_start, tl.int64)
                q_idx = q_start + q_tile
                Q_base = (
                    Q
                    + batch * Q_batch_stride
                    + tl.cast(token, tl.int64) * Q_token_stride
                    + kv_head * Q_head_stride
                    + q_row * Q_row_stride
                )
                query = tl.load(
                    Q_base + (q_tile[:, None] * Q_row_stride + d_idx[None, :] * Q_d_stride),
                    mask=q_idx[:, None] < q_len,
                    other=0.0,
                )
                score = tl.dot(query, key.T) * scale
                # test_showcase.py:23: positive = torch.relu(score)
                positive = tl.where(0.0 < score, score, 0.0)
                # test_showcase.py:24: return positive * custom.input_tensors["w"][b, q_idx, h]
                w_base = (
                    w
                    + tl.minimum(batch, w_size_0 - 1) * w_stride_0
                    + tl.cast(tl.minimum(token, w_size_1 - 1), tl.int64) * w_stride_1
                )
                w_value = tl.load(
                    w_base + tl.minimum(kv_head * q_len + q_idx, w_size_2 - 1) * w_stride_2
                )
                logit = positive * w_value[:, None]
                importance = importance + tl.sum(
                    tl.where(
                        q_idx[:, None] < q_len,
                        logit,
                        tl.full([BLOCK_Q, BLOCK_KV], 0.0, tl.float32),
                    ),
                    axis=0,
                )
                visible = (kv_idx <= token) & (kv_idx < kv_len)
                candidates_row = (
                    candidates
                    + batch * candidates_batch_stride
                    + kv_head * candidates_head_stride
                    + tl.cast(tile * tile_tokens + (token - first_token), tl.int64)
                    * candidates_row_stride
                )
                offer_tile(
                    candidates_row,
                    split,
                    splits,
                    kv_start,
                    tl.where(visible, importance, float("-inf")),
                )
