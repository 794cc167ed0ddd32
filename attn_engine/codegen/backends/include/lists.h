// Rows that lie anywhere: a table names them, one after the other.
#pragma once
#include "pages.h"

namespace attention {

/// A tensor of which one dimension is seen in the order of a table.
template <class T, int RANK> struct ListedTensor {
  Tensor<T, RANK> whole;
  const int32_t* places;
  int64_t count;
};

/// The rows along DIMENSION that `places` names from `first` on.
template <int DIMENSION, class T, int RANK>
INLINE ListedTensor<T, RANK> listed_rows(const Tensor<T, RANK>& whole, const Tensor<const int32_t, 1>& places, int64_t first,
                                         int64_t count) {
  static_assert(DIMENSION == RANK - 2, "whole rows are listed");
  return {whole, places.data + first, count};
}

/// As Matrix. No row says where the next one is.
template <class T> struct ListedMatrix {
  using Element = T;
  static constexpr bool IN_PAGES = true, SCATTERED = true;
  static constexpr int TOGETHER = 1;
  T* data;
  const int32_t* places;
  int64_t row_stride, column_stride, rows;
  T* at(int64_t row, int64_t column) const { return data + places[row] * row_stride + column * column_stride; }
  static constexpr bool in_steps(int64_t, int64_t) { return false; }

  /// Where rows 0, ..., count - 1 begin; behind the last row, where that does.
  void addresses(T** to, int count) const {
    for (int row = 0; row < count; ++row) to[row] = at(row < rows ? row : rows - 1, 0);
  }
};

template <class T, int RANK, class... Index> INLINE ListedMatrix<T> matrix(const ListedTensor<T, RANK>& x, Index... index) {
  const auto all = matrix(x.whole, index...);
  return {all.data, x.places, all.row_stride, all.column_stride, x.count};
}

template <class T> INLINE ListedMatrix<T> from_row(ListedMatrix<T> x, int first) {
  x.places += first;
  x.rows -= first;
  return x;
}

}  // namespace attention
