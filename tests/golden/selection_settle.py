# attn_engine golden | select_weighed_causal_mask_Importance: settle | triton
# rows of a tile are the query heads that share a kv head
# launch with num_warps=8, num_stages=1
import triton
import triton.language as tl


SHARE_WORDS = tl.constexpr(4)
CANDIDATES = tl.constexpr(2048)
DIGITS = tl.constexpr(256)
LOWEST = tl.constexpr(-2147483648)
HIGHEST = tl.constexpr(2147483647)


@triton.jit
def order_of(x):
    """Integers in the order of the numbers that they stand for; 0 and -0 are the same, and -inf and NaN the lowest."""
    bits = x.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x > float("-inf"), tl.where(order == -1, 0, order), LOWEST)


@triton.jit
def number_of(order):
    """The number that an order stands for."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def orders_at(orders, place, first, end):
    """What was offered at these places."""
    return tl.load(orders + place, mask=(place >= first) & (place < end), other=LOWEST)


@triton.jit
def orders_of_blocks(orders, block, first, end, STEP: tl.constexpr, REACH: tl.constexpr):
    """The orders of blocks of STEP keys, to which the REACH keys before them count too."""
    importance = tl.zeros(block.shape, tl.float32)
    seen = block < 0
    for tap in tl.static_range(-REACH, STEP):
        order = orders_at(orders, block * STEP + tap, first, end)
        until = tap + REACH + 1 if tap + REACH + 1 < STEP else STEP
        weight = until - (tap if tap > 0 else 0)
        importance += tl.where(order > LOWEST, weight * number_of(order), 0.0)
        seen = seen | (order > LOWEST)
    return tl.where(seen, order_of(importance), LOWEST)


@triton.jit
def bar_of(orders, first, end, wanted):
    """(order of the wanted-th best candidate, how many of that order are wanted); LOWEST where all are wanted."""
    digits = tl.arange(0, DIGITS)
    bar = 0  # the digits that are known, of orders with their sign turned: these rise as unsigned numbers
    for shift in tl.static_range(24, -8, -8):
        counts = tl.zeros([DIGITS], tl.int32)
        for start in tl.range(first, end, CANDIDATES):
            turned = orders_at(orders, start + tl.arange(0, CANDIDATES), first, end) ^ LOWEST
            counted = turned != 0
            if shift < 24:
                counted = counted & (((turned ^ bar) >> (shift + 8)) == 0)
            counts += tl.histogram(tl.where(counted, (turned >> shift) & 255, 0), DIGITS, mask=counted)
        from_digit = tl.cumsum(counts, axis=0, reverse=True)
        digit = tl.max(tl.where(from_digit >= wanted, digits, 0), axis=0)
        wanted -= tl.sum(tl.where(digits > digit, counts, 0), axis=0)
        bar = bar | (digit << shift)
    return bar ^ LOWEST, wanted


@triton.jit
def settle_row(row, plane, shares, topk, to, place_stride, STEP: tl.constexpr, REACH: tl.constexpr):
    """Writes the topk best of all shares to `to`: their numbers, ascending, and -1 behind."""
    first, end, forced = tl.load(row), 0, 0
    for share in tl.range(0, shares):
        first = tl.minimum(first, tl.load(row + share * SHARE_WORDS))
        end = tl.maximum(end, tl.load(row + share * SHARE_WORDS + 1))
        forced = tl.maximum(forced, tl.load(row + share * SHARE_WORDS + 2))
    orders = row + shares * SHARE_WORDS

    in_blocks: tl.constexpr = STEP > 1 or REACH > 0
    if (forced > 0) | in_blocks:  # candidates are not the keys alone
        lowest = tl.where(forced > 0, 0, first // STEP)
        highest = tl.maximum(forced, (end + REACH + STEP - 1) // STEP)
        for start in tl.range(lowest, highest, CANDIDATES):
            candidate = start + tl.arange(0, CANDIDATES)
            if in_blocks:
                order = orders_of_blocks(orders, candidate, first, end, STEP, REACH)
            else:
                order = orders_at(orders, candidate, first, end)
            taken = tl.load(orders + plane + candidate, mask=candidate < forced, other=0)
            order = tl.where(taken != 0, HIGHEST, order)
            tl.store(orders + plane + candidate, order, mask=candidate < highest)
        tl.debug_barrier()
        orders, first, end = orders + plane, lowest, highest

    bar, equals = LOWEST, 0  # all that are there
    if end - first > topk:
        bar, equals = bar_of(orders, first, end, topk)
    placed = 0
    for start in tl.range(first, end, CANDIDATES):
        candidate = start + tl.arange(0, CANDIDATES)
        order = orders_at(orders, candidate, first, end)
        equal = ((order == bar) & (order > LOWEST)).to(tl.int32)
        chosen = (order > bar) | ((equal > 0) & (tl.cumsum(equal, axis=0) <= equals))
        equals -= tl.sum(equal, axis=0)
        place = placed + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(to + place * place_stride, candidate, mask=chosen)
        placed += tl.sum(chosen.to(tl.int32), axis=0)
    for start in tl.range(placed, topk, CANDIDATES):
        place = start + tl.arange(0, CANDIDATES)
        tl.store(to + place * place_stride, -1, mask=place < topk)


@triton.jit(do_not_specialize=[
    "topk", "tokens", "first_tile", "tile_tokens", "splits"
])  # fmt: skip
def settle(
    Q, candidates, indices,
    candidates_share_stride, candidates_batch_stride, candidates_head_stride, candidates_row_stride,
    indices_batch_stride, indices_head_stride, indices_token_stride, indices_place_stride,
    topk, tokens, first_tile, tile_tokens, splits,
):  # fmt: skip
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    # -- tokens of this program
    first_token = (first_tile + tile) * tile_tokens
    token_end = tl.minimum(first_token + tile_tokens, tokens)

    # -- the best of each token in all shares of the keys
    for token in tl.range(first_token, token_end):
        candidates_row = (
            candidates
            + batch * candidates_batch_stride
            + kv_head * candidates_head_stride
            + tl.cast(tile * tile_tokens + (token - first_token), tl.int64) * candidates_row_stride
        )
        indices_row = (
            indices
            + batch * indices_batch_stride
            + kv_head * indices_head_stride
            + tl.cast(token, tl.int64) * indices_token_stride
        )
        settle_row(
            candidates_row,
            candidates_share_stride,
            splits,
            topk,
            indices_row,
            indices_place_stride,
            1,
            0,
        )
