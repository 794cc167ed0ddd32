// Rows that lie in pages: a table says which page holds rows 0 ... PAGE - 1, which the next ones, and so on.
#pragma once
#include "rows.h"

namespace attention {

/// Rows of one page after another as if they were one tensor; its first dimension counts pages.
template <class T, int RANK, int PAGE> struct PagedTensor {
  Tensor<T, RANK> cache;
  const int32_t* pages;
  int64_t pages_stride, count;
};

/// `count` rows along the last dimension but one of `cache`, in the pages at table[sequence].
template <int PAGE, class T, int RANK>
INLINE PagedTensor<T, RANK, PAGE> in_pages(const Tensor<T, RANK>& cache, const Tensor<const int32_t, 2>& table,
                                           int sequence, int count) {
  return {cache, table.data + sequence * table.strides[0], table.strides[1], count};
}

/// As Matrix, from row `first` on. Neighbouring rows are `row_stride` apart within a page only.
template <class T, int PAGE> struct PagedMatrix {
  using Element = T;
  static constexpr bool IN_PAGES = true, SCATTERED = false;
  static constexpr int TOGETHER = PAGE;  // rows in steps
  T* data;
  const int32_t* pages;
  int64_t pages_stride, page_stride, row_stride, column_stride, rows, first;
  T* at(int64_t row, int64_t column) const {
    const uint64_t place = row + first;
    return data + pages[place / PAGE * pages_stride] * page_stride + place % PAGE * row_stride + column * column_stride;
  }
  bool in_steps(int64_t row, int64_t count) const { return (uint64_t)(row + first) % PAGE + count <= PAGE; }

  /// Where rows 0, ..., count - 1 begin; behind the last row, where that does.
  void addresses(T** to, int count) const {
    for (int row = 0; row < count;) {
      T* place = at(row < rows ? row : rows - 1, 0);
      const int end = row < rows ? min(count, row + PAGE - int((uint64_t)(row + first) % PAGE)) : count;
      const int64_t step = row < rows ? row_stride : 0;
      for (; row < end; ++row, place += step) to[row] = place;
    }
  }
};

/// All rows of all pages at one head; the index of the page is that of the table, so the one given is 0.
template <class T, int PAGE> INLINE PagedMatrix<T, PAGE> matrix(const PagedTensor<T, 4, PAGE>& x, int, int head) {
  const auto& strides = x.cache.strides;
  T* data = x.cache.data + head * strides[1];
  return {data, x.pages, x.pages_stride, strides[0], strides[2], strides[3], x.count, 0};
}

template <class T, int PAGE> INLINE PagedMatrix<T, PAGE> from_row(PagedMatrix<T, PAGE> x, int first) {
  x.first += first;
  x.rows -= first;
  return x;
}

}  // namespace attention
