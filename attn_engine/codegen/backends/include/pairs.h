// Products of bfloat16 by the processor's dot instruction, which adds the products of two pairs to a float at once.
//
// A pair holds two neighbours along the axis that a product contracts. Where that axis runs along the rows of a tensor,
// pairs lie in memory already; where it runs down the rows, two rows are interleaved first.
#pragma once
#include "tiles.h"
#if defined(__AVX512BF16__) && !defined(COMPUTE_IN_DOUBLE)

namespace attention {

using Pair = uint32_t;  // the first neighbour in the low half

typedef Pair PairVector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(Pair)), may_alias));
typedef uint16_t ElementVector __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));
static_assert(WIDTH == 16 && (PARTS == 1 || PARTS % 2 == 0));

// -- storing computed lanes

/// 32 lanes from a register on, rounded to nearest; zeros follow a single register.
INLINE __m512i elements(Floats x, int part) {
  if constexpr (PARTS == 1) return (__m512i)_mm512_cvtne2ps_pbh(__m512{}, (__m512)x.part[0]);
  else return (__m512i)_mm512_cvtne2ps_pbh((__m512)x.part[part + 1], (__m512)x.part[part]);
}

/// to[lane] = x.
INLINE void store_elements(BFloat16* to, Floats x) {
  if constexpr (PARTS == 1) _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(elements(x, 0)));
  else UNROLL for (int p = 0; p < PARTS; p += 2) _mm512_storeu_si512(to + p * WIDTH, elements(x, p));
}

/// Pairs of the elements of two rows: columns 0 ... 15 and 16 ... 31.
INLINE void interleave(__m512i first, __m512i second, PairVector (&pairs)[2]) {
  ElementVector low, high;
  UNROLL for (int i = 0; i < 2 * WIDTH; ++i) {
    low[i] = i / 2 + (i % 2) * 2 * WIDTH;
    high[i] = i / 2 + WIDTH + (i % 2) * 2 * WIDTH;
  }
  pairs[0] = (PairVector)_mm512_permutex2var_epi16(first, (__m512i)low, second);
  pairs[1] = (PairVector)_mm512_permutex2var_epi16(first, (__m512i)high, second);
}

/// Rows come one after the other: an even one waits in `even` for its neighbour.
INLINE void store_pairs(Pair* to, int row, Floats& even, Floats x) {
  if (row % 2 == 0) {
    even = x;
  } else {
    UNROLL for (int p = 0; p < PARTS; p += 2) {
      PairVector pairs[2];
      interleave(elements(even, p), elements(x, p), pairs);
      *(PairVector*)(to + p * WIDTH) = pairs[0];
      if constexpr (PARTS > 1) *(PairVector*)(to + (p + 1) * WIDTH) = pairs[1];
    }
  }
}

// -- tiles of tensors

struct ElementRows {  // a row-major matrix of bfloat16, read in place
  const BFloat16* data;
  int64_t stride;
  const BFloat16* operator[](int64_t row) const { return data + row * stride; }
};

/// Rows first, ..., first + count - 1 (up to a whole block of ROWS) for pairs along the rows: in place when they are
/// there and have an even number of columns, else copied to `spare` with zeros around.
template <int COLUMNS, class M, int PADDED>
OUTLINE ElementRows element_rows_of(const M& x, int first, int count, BFloat16 (*spare)[PADDED]) {
  const int wanted = round_up(count, ROWS);
  if (COLUMNS == PADDED && x.column_stride == 1 && first + wanted <= x.rows && x.in_steps(first, wanted))
    return {x.at(first, 0), x.row_stride};
  for (int row = 0; row < wanted; ++row)
    for (int column = 0; column < PADDED; ++column)
      spare[row][column] = first + row < x.rows && column < COLUMNS ? *x.at(first + row, column) : BFloat16{0};
  return {spare[0], PADDED};
}

/// to[i][column] = the pair of x[first + 2i][column] and x[first + 2i + 1][column]; zeros from row `count` on and from
/// column COLUMNS on.
template <int COLUMNS, class M, int PADDED>
OUTLINE void pack_row_pairs(Pair (*to)[PADDED], const M& x, int first, int count) {
  constexpr int VECTORS = COLUMNS / (2 * WIDTH) * 2 * WIDTH;
  for (int row = 0; row < count; row += 2) {
    Pair* pairs = to[row / 2];
    const bool whole = row + 1 < count;
    int column = 0;
    if (x.column_stride == 1)
      for (; column < VECTORS; column += 2 * WIDTH) {
        const __m512i even = _mm512_loadu_si512(x.at(first + row, column));
        const __m512i odd = whole ? _mm512_loadu_si512(x.at(first + row + 1, column)) : __m512i{};
        PairVector both[2];
        interleave(even, odd, both);
        *(PairVector*)(pairs + column) = both[0], *(PairVector*)(pairs + column + WIDTH) = both[1];
      }
    for (; column < COLUMNS; ++column)
      pairs[column] = x.at(first + row, column)->bits | (whole ? x.at(first + row + 1, column)->bits << 16 : 0);
    for (; column < PADDED; ++column) pairs[column] = 0;
  }
}

/// to[i][lane] = the pair of columns 2i and 2i + 1 of x[first + lane]; lanes from `count` on are zero.
template <int COLUMNS, class M>
OUTLINE void pack_lane_pairs(Pair (*to)[LANES], const M& x, int first, int count) {
  constexpr int PAIRS = (COLUMNS + 1) / 2, SQUARES = COLUMNS / 2 / WIDTH * WIDTH;
  const int vectors = x.column_stride == 1 ? SQUARES : 0;
  for (int lane = 0; lane < LANES; lane += WIDTH) {
    for (int pair = 0; pair < vectors; pair += WIDTH) {
      FloatVector square[WIDTH];  // transposed as if they were floats
      UNROLL for (int i = 0; i < WIDTH; ++i)
        square[i] = lane + i < count ? *(const FloatVector*)x.at(first + lane + i, 2 * pair) : FloatVector{};
      transpose(square);
      UNROLL for (int i = 0; i < WIDTH; ++i) *(FloatVector*)(to[pair + i] + lane) = square[i];
    }
    for (int pair = vectors; pair < PAIRS; ++pair)
      for (int i = lane; i < lane + WIDTH; ++i) {
        const Pair low = i < count ? x.at(first + i, 2 * pair)->bits : 0;
        const Pair high = i < count && 2 * pair + 1 < COLUMNS ? x.at(first + i, 2 * pair + 1)->bits : 0;
        to[pair][i] = low | high << 16;
      }
  }
}

// -- the micro-kernel

/// sums[r] += sum over k of a[r, k] * b[k], two neighbouring k at a time: pairs of `a` by any two strides (in its own
/// elements), lanes of pairs of `b` by one.
template <class Number>
INLINE void multiply_add(Floats (&sums)[ROWS], int depth, const Number* a, int64_t row_stride, int64_t pair_stride,
                         const Pair* b, int64_t lanes_stride) {
  Floats registers[ROWS];  // `sums` itself is memory where a loop indexes it
  UNROLL for (int r = 0; r < ROWS; ++r) registers[r] = sums[r];
  for (int k = 0; k < depth; k += 2) {
    PairVector lanes[PARTS];
    UNROLL for (int p = 0; p < PARTS; ++p) lanes[p] = *(const PairVector*)(b + p * WIDTH);
    UNROLL for (int r = 0; r < ROWS; ++r) {
      int pair;
      __builtin_memcpy(&pair, a + r * row_stride, sizeof(pair));
      const __m512bh number = (__m512bh)_mm512_set1_epi32(pair);
      UNROLL for (int p = 0; p < PARTS; ++p)
        registers[r].part[p] = (FloatVector)_mm512_dpbf16_ps((__m512)registers[r].part[p], number, (__m512bh)lanes[p]);
    }
    a += pair_stride, b += lanes_stride;
  }
  UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = registers[r];
}

}  // namespace attention

#endif
