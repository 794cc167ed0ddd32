// The best candidates of a row, chosen while their numbers are still being computed.
//
// A row has a state of a few numbers for each of the `topk` that it wants. What is offered and lies above the bar, the
// number of the worst of the topk best so far, is written behind the others; when the state is full it is pruned to the
// topk best, and the bar rises. Candidates come in the order of their indices, so of equal ones the first is better, and
// what is kept stays in that order: nothing is ever sorted.
#pragma once
#include "tiles.h"

namespace attention {

/// Integers in the order of the numbers that they stand for; 0 and -0 are the same.
INLINE IntVector order_of(FloatVector x) {
  const IntVector bits = (IntVector)x, order = bits ^ ((bits >> (8 * (int)sizeof(Int) - 1)) & (Int)(~((Int)1 << (8 * sizeof(Int) - 1))));
  return order - (order == -1);
}
INLINE Real number_of(Int order) {
  const Int bits = order ^ ((order >> (8 * (int)sizeof(Int) - 1)) & (Int)(~((Int)1 << (8 * sizeof(Int) - 1))));
  Real x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

struct Progress {  // of one row
  Real bar;             // a candidate must be above it
  int32_t count;        // candidates that are kept
  int32_t forced;       // candidates that are taken in any case
  int32_t block, next;  // the first block that is not complete, and the first key that has not been offered
};
constexpr int PROGRESS_WORDS = 8;  // of 32 bits, as a state is measured
static_assert(sizeof(Progress) <= 4 * PROGRESS_WORDS);

/// Where the state of one row lies. Candidates are keys (STEP 1, REACH 0), or blocks of STEP keys to which the REACH keys
/// before them count too.
template <int STEP, int REACH> struct State {
  static constexpr int CARRY = STEP - 1 + REACH;  // keys of incomplete blocks
  static constexpr int WINDOWS = CARRY ? round_up(CARRY + LANES, LANES) : 0;
  Progress* progress;
  Real* windows;   // the keys of a tile, after the last ones of the tile before
  Int* orders;     // of the candidates that are kept
  int32_t* indices;
  int32_t* forced;
  int topk, capacity;  // LANES more fit in
};

template <int STEP = 1, int REACH = 0>
INLINE State<STEP, REACH> state_of(const Tensor<int32_t, 5>& states, int topk, int64_t share, int64_t batch, int64_t head,
                                   int64_t row) {
  constexpr int WORDS = sizeof(Real) / 4;
  using Found = State<STEP, REACH>;
  const auto& stride = states.strides;
  int32_t* const words = states.data + share * stride[0] + batch * stride[1] + head * stride[2] + row * stride[3];
  const int slots = ((int)states.sizes[4] - PROGRESS_WORDS - Found::WINDOWS * WORDS - topk) / (WORDS + 1);
  Real* const windows = (Real*)(words + PROGRESS_WORDS);
  Int* const orders = (Int*)(windows + Found::WINDOWS);
  int32_t* const indices = (int32_t*)(orders + slots);
  return {(Progress*)words, windows, orders, indices, indices + slots, topk, slots - LANES};
}

// -- pruning

/// How many of the orders are `bar` or higher.
INLINE int count_from(const Int* orders, int count, Int bar) {
  int i = 0, n = 0;
#if defined(__AVX512F__) && !defined(COMPUTE_IN_DOUBLE)
  for (; i < count; i += WIDTH) {
    const unsigned there = i + WIDTH <= count ? 0xffff : (1 << (count - i)) - 1;
    n += __builtin_popcount(_mm512_mask_cmpge_epi32_mask(there, _mm512_loadu_si512(orders + i), _mm512_set1_epi32(bar)));
  }
#else
  IntVector found = {};
  for (; i + WIDTH <= count; i += WIDTH) found -= *(const IntVector*)(orders + i) >= bar;
  UNROLL for (int lane = 0; lane < WIDTH; ++lane) n += found[lane];
  for (; i < count; ++i) n += orders[i] >= bar;
#endif
  return n;
}

/// The k-th largest of the orders, bit by bit from the highest. 1 <= k <= count.
INLINE Int kth_largest(const Int* orders, int count, int k) {
  constexpr int BITS = 8 * sizeof(Int);
  constexpr Int SIGN = (Int)1 << (BITS - 1);
  Int found = SIGN;  // the lowest of all
  for (int bit = BITS - 1; bit >= 0; --bit) {
    const Int higher = bit == BITS - 1 ? 0 : found | (Int)1 << bit;
    if (count_from(orders, count, higher) >= k) found = higher;
  }
  return found;
}

/// Keeps the `wanted` best candidates, in their order.
template <int STEP, int REACH> OUTLINE void prune(const State<STEP, REACH>& s, int wanted) {
  const int count = s.progress->count;
  if (count <= wanted) return;
  if (wanted == 0) {
    s.progress->count = 0;
    return;
  }
  const Int bar = kth_largest(s.orders, count, wanted);
  int equal = wanted - count_from(s.orders, count, bar + 1);  // how many of those at the bar are kept
  int i = 0, kept = 0;
#if defined(__AVX512F__) && defined(__BMI2__) && !defined(COMPUTE_IN_DOUBLE)
  for (; i + WIDTH <= count; i += WIDTH) {  // what is written has been read
    const __m512i orders = _mm512_loadu_si512(s.orders + i), indices = _mm512_loadu_si512(s.indices + i);
    const unsigned higher = _mm512_cmpgt_epi32_mask(orders, _mm512_set1_epi32(bar));
    unsigned there = _mm512_cmpeq_epi32_mask(orders, _mm512_set1_epi32(bar));
    if (there) {
      if (equal < WIDTH) there = _pdep_u32((1u << equal) - 1, there);  // the first ones
      equal -= __builtin_popcount(there);
    }
    _mm512_storeu_si512(s.orders + kept, _mm512_maskz_compress_epi32(higher | there, orders));
    _mm512_storeu_si512(s.indices + kept, _mm512_maskz_compress_epi32(higher | there, indices));
    kept += __builtin_popcount(higher | there);
  }
#endif
  for (; i < count; ++i) {
    const Int order = s.orders[i];
    const bool keep = order > bar || (order == bar && equal > 0);
    equal -= order == bar;
    s.orders[kept] = order, s.indices[kept] = s.indices[i];
    kept += keep;
  }
  s.progress->count = kept;
  s.progress->bar = number_of(bar);
}

// -- offering

/// A bit for each lane that is above the bar; NaN is not.
INLINE unsigned above(FloatVector x, Real bar) {
#if defined(__AVX512F__) && !defined(COMPUTE_IN_DOUBLE)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(bar), _CMP_GT_OQ);
#else
  unsigned bits = 0;
  UNROLL for (int i = 0; i < WIDTH; ++i) bits |= (unsigned)(x[i] > bar) << i;
  return bits;
#endif
}

/// Writes the lanes of `bits` behind what is kept.
template <int STEP, int REACH>
INLINE void append(const State<STEP, REACH>& s, FloatVector x, unsigned bits, int first) {
  int& count = s.progress->count;
#if defined(__AVX512F__) && !defined(COMPUTE_IN_DOUBLE)
  const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  _mm512_storeu_si512(s.orders + count, _mm512_maskz_compress_epi32(bits, (__m512i)order_of(x)));
  _mm512_storeu_si512(s.indices + count, _mm512_maskz_compress_epi32(bits, index));
  count += __builtin_popcount(bits);
#else
  const IntVector order = order_of(x);
  for (; bits; bits &= bits - 1) {
    const int lane = __builtin_ctz(bits);
    s.orders[count] = order[lane], s.indices[count++] = first + lane;
  }
#endif
}

template <int STEP, int REACH> INLINE void offer_lanes(const State<STEP, REACH>& s, int first, const FloatVector* x, int vectors) {
  const Real bar = s.progress->bar;
  for (int p = 0; p < vectors; ++p)
    if (const unsigned bits = above(x[p], bar)) append(s, x[p], bits, first + p * WIDTH);
  if (s.progress->count > s.capacity) prune(s, s.topk);
}

/// Blocks that the keys first, ..., first + LANES - 1 complete. A key that is no candidate adds nothing.
template <int STEP, int REACH> OUTLINE void offer_blocks(const State<STEP, REACH>& s, int first, Floats value) {
  constexpr int CARRY = State<STEP, REACH>::CARRY;
  int& block = s.progress->block;
  for (int i = 0; i < CARRY; ++i) s.windows[i] = s.windows[LANES + i];
  store(s.windows + CARRY, value);
  s.progress->next = first + LANES;
  FloatVector sums = FloatVector{} - INFINITY;
  int lane = 0, start = block;
  for (; block * STEP + STEP - 1 < first + LANES; ++block) {
    const Real* keys = s.windows + (block * STEP - first + CARRY);
    Real sum = 0;
    bool seen = false;
    UNROLL for (int o = -REACH; o < STEP; ++o) {
      const int weight = min(o + REACH + 1, STEP) - max(o, 0);
      const bool there = keys[o] > -INFINITY;
      sum += there ? weight * keys[o] : 0;
      seen |= there;
    }
    sums[lane++] = seen ? sum : -INFINITY;
    if (lane == WIDTH) {
      offer_lanes(s, start, &sums, 1);
      sums = FloatVector{} - INFINITY, lane = 0, start = block + 1;
    }
  }
  if (lane) offer_lanes(s, start, &sums, 1);
}

/// The numbers of the keys first, ..., first + LANES - 1; -INFINITY and NaN are no candidates.
template <int STEP, int REACH> INLINE void offer(const State<STEP, REACH>& s, int first, Floats value) {
  if constexpr (STEP == 1 && REACH == 0) offer_lanes(s, first, value.part, PARTS);
  else offer_blocks(s, first, value);
}

/// Nothing has been offered; the first tile begins at key `first`.
template <int STEP, int REACH> INLINE void begin(const State<STEP, REACH>& s, int first) {
  *s.progress = {-INFINITY, 0, 0, floor_div(first, STEP), first};
  for (int i = 0; i < State<STEP, REACH>::WINDOWS; ++i) s.windows[i] = -INFINITY;
}

/// Candidates first, first + 1, ... that are taken in any case where `taken`; of too many the first.
template <int STEP, int REACH> INLINE void force(const State<STEP, REACH>& s, int first, Mask taken) {
  int& count = s.progress->forced;
  UNROLL for (int p = 0; p < PARTS; ++p) {
    const FloatVector numbers = (FloatVector)(taken.part[p] & (IntVector)(FloatVector{} + 1));
    for (unsigned bits = above(numbers, 0); bits && count < s.topk; bits &= bits - 1)
      s.forced[count++] = first + p * WIDTH + __builtin_ctz(bits);
  }
}

// -- the end

/// Offers the blocks that reach beyond the last key.
template <int STEP, int REACH> INLINE void finish(const State<STEP, REACH>& s) {
  if constexpr (STEP > 1 || REACH > 0) {
    const int end = s.progress->next;
    while (s.progress->block * STEP - REACH < end) offer_blocks(s, s.progress->next, fill(-INFINITY));
  }
}

/// The candidates of a state without its forced ones.
template <int STEP, int REACH> INLINE void drop_forced(const State<STEP, REACH>& s) {
  int kept = 0, f = 0;
  for (int i = 0; i < s.progress->count; ++i) {
    const int index = s.indices[i];
    while (f < s.progress->forced && s.forced[f] < index) ++f;
    s.orders[kept] = s.orders[i], s.indices[kept] = index;
    kept += f == s.progress->forced || s.forced[f] != index;
  }
  s.progress->count = kept;
}

/// to[batch][head][row] = the indices of the topk best of all shares of the keys, ascending, -1 behind.
template <int STEP = 1, int REACH = 0>
OUTLINE void settle(const Tensor<int32_t, 5>& states, int topk, int shares, int64_t batch, int64_t head, int64_t place,
                    const Tensor<int32_t, 4>& to, int64_t to_batch, int64_t to_head, int64_t to_row) {
  const auto s = state_of<STEP, REACH>(states, topk, 0, batch, head, place);
  finish(s);
  for (int share = 1; share < shares; ++share) {  // shares follow each other, so indices stay in order
    const auto other = state_of<STEP, REACH>(states, topk, share, batch, head, place);
    prune(s, topk);
    prune(other, topk);
    for (int i = 0, count = other.progress->count; i < count; ++i) {
      s.orders[s.progress->count] = other.orders[i];
      s.indices[s.progress->count++] = other.indices[i];
    }
  }
  const int forced = s.progress->forced;
  prune(s, topk);
  if (forced) drop_forced(s), prune(s, topk - forced);
  const auto& stride = to.strides;
  int32_t* const row = to.data + to_batch * stride[0] + to_head * stride[1] + to_row * stride[2];
  const int count = s.progress->count;
  int i = 0, f = 0, n = 0;
  for (; i < count || f < forced; ++n) {
    const bool of_forced = i == count || (f < forced && s.forced[f] < s.indices[i]);
    row[n * stride[3]] = of_forced ? s.forced[f++] : s.indices[i++];
  }
  for (; n < topk; ++n) row[n * stride[3]] = -1;
}

}  // namespace attention
