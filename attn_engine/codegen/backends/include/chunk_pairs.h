// Products of tiles where q, k and v are bfloat16: what is multiplied is rounded to that again and taken in pairs; sums stay
// float. A product packs its operands itself, which costs a tenth of it: the rest of a kernel need not know.
#pragma once
#include "kernel.h"
#if defined(PAIRED_PRODUCTS)

namespace attention {

/// The pairs of 16 columns of two rows.
INLINE PairVector pairs_of(FloatVector even, FloatVector odd) {
  ElementVector order;
  UNROLL for (int i = 0; i < 2 * WIDTH; ++i) order[i] = i / 2 + (i % 2) * WIDTH;
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (PairVector)_mm512_permutexvar_epi16((__m512i)order, both);
}

/// Room for so many pairs, until the function that asks returns.
#define ROOM_FOR_PAIRS(COUNT) ((Pair*)__builtin_alloca_with_align(((COUNT) + WIDTH) * sizeof(Pair), 512))

/// to[i][column] = the pair of x[2i][column] and x[2i + 1][column]; nothing stands for a row from `rows` on.
INLINE void pack_pairs(Pair* to, int64_t to_stride, const Real* x, int64_t stride, int rows, int columns) {
  for (int row = 0; row < rows; row += 2, to += to_stride)
    for (int column = 0; column < columns; column += WIDTH) {
      const Real* place = x + row * stride + column;
      const FloatVector odd = row + 1 < rows ? *(const FloatVector*)(place + stride) : FloatVector{};
      *(PairVector*)(to + column) = pairs_of(*(const FloatVector*)place, odd);
    }
}

/// to[row][i] = the pair of x[row][2i] and x[row][2i + 1]; columns are taken up to a multiple of 16.
INLINE void pack_rows(Pair* to, int64_t to_stride, const Real* x, int64_t stride, int rows, int columns) {
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < columns; column += WIDTH) {
      const __m512 values = (__m512)*(const FloatVector*)(x + row * stride + column);
      _mm256_storeu_si256((__m256i*)(to + row * to_stride + column / 2), (__m256i)_mm512_cvtneps_pbh(values));
    }
}

/// The same with row i times by[i].
INLINE void pack_scaled_pairs(Pair* to, int64_t to_stride, const Real* x, int64_t stride, int rows, int columns, const Real* by) {
  for (int row = 0; row < rows; row += 2, to += to_stride)
    for (int column = 0; column < columns; column += WIDTH) {
      const Real* place = x + row * stride + column;
      const FloatVector odd = row + 1 < rows ? *(const FloatVector*)(place + stride) * by[row + 1] : FloatVector{};
      *(PairVector*)(to + column) = pairs_of(*(const FloatVector*)place * by[row], odd);
    }
}

/// Numbers of a product, by any two strides of which one is 1, as pairs along its depth.
struct Numbers {
  Pair* pairs;
  int64_t row_stride, pair_stride;
  /// x transposed, with row i of x times by[i] where there is `by`.
  Numbers(Pair* room, const Real* x, int64_t stride, int rows, int depth, const Real* by)
      : pairs(room), row_stride(1), pair_stride(round_up(rows, WIDTH)) {
    if (by) pack_scaled_pairs(pairs, pair_stride, x, stride, depth, rows, by);
    else pack_pairs(pairs, pair_stride, x, stride, depth, rows);
  }
  Numbers(Pair* room, const Real* a, int64_t stride, int64_t depth_stride, int rows, int depth) : pairs(room) {
    if (depth_stride == 1) {
      row_stride = round_up(depth, WIDTH) / 2, pair_stride = 1;
      pack_rows(pairs, row_stride, a, stride, rows, depth);
    } else {
      row_stride = 1, pair_stride = round_up(rows, WIDTH);
      pack_pairs(pairs, pair_stride, a, depth_stride, depth, rows);
    }
  }
  const Pair* at(int row, int depth) const { return pairs + row * row_stride + depth / 2 * pair_stride; }
};
INLINE int64_t room_for_numbers(int rows, int depth) { return (int64_t)round_up(rows, WIDTH) * round_up(depth, WIDTH) / 2; }

/// x transposed, as pairs: to[i][row] = the pair of x[row][2i] and x[row][2i + 1].
template <int C> INLINE void transpose_pairs(Pair (*to)[C], const Real* x, int64_t stride, int rows, int columns) {
  Pair square_rows[WIDTH][WIDTH];
  for (int row = 0; row < rows; row += WIDTH)
    for (int column = 0; column < columns; column += 2 * WIDTH) {
      pack_rows(square_rows[0], WIDTH, x + row * stride + column, stride, WIDTH, 2 * WIDTH);
      FloatVector square[WIDTH];  // transposed as if they were floats
      UNROLL for (int i = 0; i < WIDTH; ++i) square[i] = *(const FloatVector*)square_rows[i];
      transpose(square);
      UNROLL for (int i = 0; i < WIDTH; ++i) *(FloatVector*)(to[column / 2 + i] + row) = square[i];
    }
}

/// sums[r] += sum over k of a[r, k] * b[k], two neighbouring k at a time, with one register of lanes.
INLINE void multiply_add(FloatVector (&sums)[ACCUMULATORS], int depth, const Pair* a, int64_t row_stride,
                         int64_t pair_stride, const Pair* b, int64_t lanes_stride) {
  FloatVector registers[ACCUMULATORS];
  UNROLL for (int r = 0; r < ACCUMULATORS; ++r) registers[r] = sums[r];
  for (int k = 0; k < depth; k += 2) {
    const __m512bh lanes = (__m512bh)*(const PairVector*)b;
    UNROLL for (int r = 0; r < ACCUMULATORS; ++r)
      registers[r] = (FloatVector)_mm512_dpbf16_ps((__m512)registers[r], lanes, (__m512bh)_mm512_set1_epi32((int)a[r * row_stride]));
    a += pair_stride, b += lanes_stride;
  }
  UNROLL for (int r = 0; r < ACCUMULATORS; ++r) sums[r] = registers[r];
}

}  // namespace attention

#endif
