// Rows in bytes with scales of their own: numbers, byte times scale, where they are read. Whatever finds a row of the
// bytes (a sequence, a page, a head) finds its scales alike.
#pragma once
#include "pages.h"

namespace attention {

constexpr int COLUMNS_OF_SCALE = 128;  // where a row has several

/// Two tensors, one after the other, as arguments hold them.
template <class X, class S> struct Scaled {
  X numbers;
  S scales;
};

template <class X, class S> struct ScaledMatrix {
  using Element = typename X::Element;
  static constexpr bool IN_PAGES = X::IN_PAGES, SCATTERED = X::SCATTERED;
  X numbers;
  S scales;
  int64_t block;  // columns of one scale
  int64_t row_stride, column_stride, rows;
  const Element* at(int64_t row, int64_t column) const { return numbers.at(row, column); }
  /// Never to be read in place.
  static constexpr bool in_steps(int64_t, int64_t) { return false; }
};

template <class X, class S> constexpr bool SCALED<ScaledMatrix<X, S>> = true;

template <class X, class S> INLINE ScaledMatrix<X, S> scaled_matrix(const X& numbers, const S& scales, int64_t block) {
  return {numbers, scales, block, numbers.row_stride, numbers.column_stride, numbers.rows};
}

template <int DIMENSION, class X, class S> INLINE Scaled<X, S> rows_of(const Scaled<X, S>& x, int64_t first, int64_t count) {
  return {rows_of<DIMENSION>(x.numbers, first, count), rows_of<DIMENSION>(x.scales, first, count)};
}

template <int PAGE, class X, class S>
INLINE auto in_pages(const Scaled<X, S>& x, const Tensor<const int32_t, 2>& table, int sequence, int count) {
  const auto numbers = in_pages<PAGE>(x.numbers, table, sequence, count);
  const auto scales = in_pages<PAGE>(x.scales, table, sequence, count);
  return Scaled<std::remove_const_t<decltype(numbers)>, std::remove_const_t<decltype(scales)>>{numbers, scales};
}

template <class T, int RANK> INLINE int64_t columns_of(const Tensor<T, RANK>& x) { return x.sizes[RANK - 1]; }
template <class T, int RANK, int PAGE> INLINE int64_t columns_of(const PagedTensor<T, RANK, PAGE>& x) {
  return columns_of(x.cache);
}

template <class X, class S, class... Index> INLINE auto matrix(const Scaled<X, S>& x, Index... index) {
  const int64_t block = columns_of(x.scales) == 1 ? columns_of(x.numbers) : COLUMNS_OF_SCALE;
  return scaled_matrix(matrix(x.numbers, index...), matrix(x.scales, index...), block);
}

template <class X, class S> INLINE ScaledMatrix<X, S> from_row(const ScaledMatrix<X, S>& x, int first) {
  return scaled_matrix(from_row(x.numbers, first), from_row(x.scales, first), x.block);
}

/// `count` numbers of one row.
template <class X, class S> INLINE void read_row(Real* to, const ScaledMatrix<X, S>& x, int64_t row, int count) {
  const auto* from = x.at(row, 0);
  for (int start = 0, part = 0; start < count; start += x.block, ++part) {
    const Real scale = value_of(*x.scales.at(row, part));
    const int end = min(start + (int)x.block, count);
    int column = start;
    if (x.column_stride == 1)
      for (; column + WIDTH <= end; column += WIDTH) *(FloatVector*)(to + column) = load_vector(from + column) * scale;
    for (; column < end; ++column) to[column] = value_of(from[column * x.column_stride]) * scale;
  }
}

}  // namespace attention
