// Tiles: rows of q, k, v and their like, read in place where possible, and the micro-kernel that multiplies them.
#pragma once
#include "storage.h"

namespace attention {

constexpr int round_up(int n, int step) { return (n + step - 1) / step * step; }

/// The last two dimensions of a tensor.
template <class T> struct Matrix {
  using Element = T;
  static constexpr bool IN_PAGES = false, SCATTERED = false;  // whether rows lie anywhere
  T* data;
  int64_t row_stride, column_stride, rows, columns = 0;
  T* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
  /// Whether `row_stride` leads from each of these rows to the next.
  static constexpr bool in_steps(int64_t, int64_t) { return true; }
};

/// Whether rows of a matrix have scales (scaled.h).
template <class M> constexpr bool SCALED = false;

template <class T, int RANK, class... Index> INLINE Matrix<T> matrix(const Tensor<T, RANK>& tensor, Index... index) {
  static_assert(sizeof...(Index) == RANK - 2, "an index for each dimension but the last two");
  T* data = tensor.data;
  int i = 0;
  ((data += index * tensor.strides[i++]), ...);
  return {data, tensor.strides[RANK - 2], tensor.strides[RANK - 1], tensor.sizes[RANK - 2], tensor.sizes[RANK - 1]};
}

struct Rows {  // a row-major matrix of compute numbers, read in place
  const Real* data;
  int64_t stride;
  const Real* operator[](int64_t row) const { return data + row * stride; }
};

/// `count` elements of one row, converted.
template <class M> INLINE void read_row(Real* to, const M& x, int64_t row, int count) {
  const typename M::Element* from = x.at(row, 0);
  int column = 0;
  if (x.column_stride == 1)
    for (; column + WIDTH <= count; column += WIDTH) *(FloatVector*)(to + column) = load_vector(from + column);
  for (; column < count; ++column) to[column] = value_of(from[column * x.column_stride]);
}

/// Elements between rows from which on each second row at most shares a page with another one.
constexpr int FAR = 256;

/// Asks for rows that will be read next. Where rows lie far apart, as heads between them make them, neither the
/// hardware's prefetchers nor its walks through the table of pages are ahead.
template <int COLUMNS, class M> INLINE void fetch_rows(const M& x, int64_t first, int count) {
  const int64_t end = first + count < x.rows ? first + count : x.rows;
  for (int64_t row = first; row < end; ++row)
    for (int column = 0; column < COLUMNS; column += 64 / int(sizeof(typename M::Element))) __builtin_prefetch(x.at(row, column), 0, 2);
}

/// Asks for a share of the rows first, ..., first + COUNT - 1: that of the trip `block` of a loop over ROWS of TRIPS.
template <int COLUMNS, int COUNT, int TRIPS, class M> INLINE void fetch_share(const M& x, int64_t first, int block) {
  const int begin = block * COUNT / TRIPS, end = (block + ROWS) * COUNT / TRIPS;
  fetch_rows<COLUMNS>(x, first + begin, (end < COUNT ? end : COUNT) - begin);
}

/// Whether rows at that distance share few sets of a cache: a tile of them does not stay there while it is read again.
template <class M> INLINE bool rows_collide(const M& x) {
  return x.row_stride >= FAR && x.row_stride * int64_t(sizeof(typename M::Element)) % 1024 == 0;
}

/// Rows first, ..., first + count - 1 (up to a whole block of ROWS): in place when they are there and need neither
/// conversion nor padding and can stay in a cache, else copied to `spare` with zeros around. IN_ORDER: the rows after
/// these are read next.
template <int COLUMNS, bool IN_ORDER = true, class M, int PADDED>
OUTLINE Rows tile_of(const M& x, int first, int count, Real (*spare)[PADDED]) {
  const int wanted = round_up(count, ROWS);
  if (IN_ORDER && (M::SCATTERED || x.row_stride >= FAR)) fetch_rows<COLUMNS>(x, first + count, count);
  if constexpr (std::is_same_v<std::remove_const_t<typename M::Element>, Real> && COLUMNS == PADDED)
    if (x.column_stride == 1 && first + wanted <= x.rows && x.in_steps(first, wanted) && !rows_collide(x))
      return {x.at(first, 0), x.row_stride};
  for (int row = 0; row < wanted; ++row) {
    const int columns = first + row < x.rows ? COLUMNS : 0;
    if (columns) read_row(spare[row], x, first + row, columns);
    for (int column = columns; column < PADDED; ++column) spare[row][column] = 0;
  }
  return {spare[0], PADDED};
}

// -- tiles with a row per lane, of queries or of keys: transposed on the way in and out

/// Transposes a square of WIDTH registers in place.
INLINE void transpose(FloatVector (&v)[WIDTH]) {
  UNROLL for (int step = 1; step < WIDTH; step *= 2) {
    IntVector even, odd;
    for (int i = 0; i < WIDTH; ++i) {
      even[i] = i & step ? WIDTH + i - step : i;
      odd[i] = i & step ? WIDTH + i : i + step;
    }
    UNROLL for (int i = 0; i < WIDTH; ++i) {
      if (i & step) continue;
      const FloatVector a = v[i], b = v[i + step];
#if defined(__clang__)
      for (int k = 0; k < WIDTH; ++k) {
        v[i][k] = even[k] < WIDTH ? a[even[k]] : b[even[k] - WIDTH];
        v[i + step][k] = odd[k] < WIDTH ? a[odd[k]] : b[odd[k] - WIDTH];
      }
#else
      v[i] = __builtin_shuffle(a, b, even), v[i + step] = __builtin_shuffle(a, b, odd);
#endif
    }
  }
}

/// to[column][lane] = x[first + lane][column] * factor; lanes from `count` on are zero.
template <int COLUMNS, class M>
OUTLINE void pack_lanes(Real (*to)[LANES], const M& x, int first, int count, Real factor) {
  constexpr int SQUARES = COLUMNS / WIDTH * WIDTH;
  if (M::SCATTERED) fetch_rows<COLUMNS>(x, first + count, LANES);
  const int vectors = x.column_stride == 1 ? SQUARES : 0;
  for (int lane = 0; lane < LANES; lane += WIDTH) {
    for (int column = 0; column < vectors; column += WIDTH) {
      FloatVector square[WIDTH];
      UNROLL for (int i = 0; i < WIDTH; ++i)
        square[i] = lane + i < count ? load_vector(x.at(first + lane + i, column)) * factor : FloatVector{};
      transpose(square);
      UNROLL for (int i = 0; i < WIDTH; ++i) *(FloatVector*)(to[column + i] + lane) = square[i];
    }
    for (int column = vectors; column < COLUMNS; ++column)
      for (int i = lane; i < lane + WIDTH; ++i) to[column][i] = i < count ? value_of(*x.at(first + i, column)) * factor : 0;
  }
}

/// to[column][lane] = x[first + lane][start + column]; zero in lanes from `count` on, in columns from `wanted` on, and
/// outside x, where hidden pairs may lie.
template <int COLUMNS, class T>
OUTLINE void pack_lanes_of_pairs(Real (*to)[LANES], const Matrix<T>& x, int first, int count, int start, int wanted) {
  const int lanes = min(count, (int)x.rows - first), columns = min(wanted, (int)x.columns - start);
  for (int lane = 0; lane < LANES; lane += WIDTH) {
    int column = 0;
    if (x.column_stride == 1) {
      for (; column + WIDTH <= columns; column += WIDTH) {
        FloatVector square[WIDTH];
        UNROLL for (int i = 0; i < WIDTH; ++i)
          square[i] = lane + i < lanes ? load_vector(x.at(first + lane + i, start + column)) : FloatVector{};
        transpose(square);
        UNROLL for (int i = 0; i < WIDTH; ++i) *(FloatVector*)(to[column + i] + lane) = square[i];
      }
    } else if (x.row_stride == 1 && lane + WIDTH <= lanes) {
      for (; column < columns; ++column)
        *(FloatVector*)(to[column] + lane) = load_vector(x.at(first + lane, start + column));
    }
    for (; column < COLUMNS; ++column)
      for (int i = lane; i < lane + WIDTH; ++i)
        to[column][i] = i < lanes && column < columns ? value_of(*x.at(first + i, start + column)) : 0;
  }
}

/// to[first + lane][column] = x[column][lane] for the first `count` lanes.
template <int COLUMNS, class M>
OUTLINE void unpack_lanes(const M& to, int first, int count, const Real (*x)[LANES]) {
  using T = typename M::Element;
  constexpr int SQUARES = COLUMNS / WIDTH * WIDTH;
  if (M::SCATTERED) fetch_rows<COLUMNS>(to, first, count);
  const int vectors = to.column_stride == 1 ? SQUARES : 0;
  for (int lane = 0; lane < count; lane += WIDTH) {
    const int rows = min(WIDTH, count - lane);
    for (int column = 0; column < vectors; column += WIDTH) {
      FloatVector square[WIDTH];
      UNROLL for (int i = 0; i < WIDTH; ++i) square[i] = *(const FloatVector*)(x[column + i] + lane);
      transpose(square);
      UNROLL for (int i = 0; i < WIDTH; ++i)
        if (i < rows) store_vector(to.at(first + lane + i, column), square[i], WIDTH);
    }
    for (int column = vectors; column < COLUMNS; ++column)
      for (int i = lane; i < lane + rows; ++i) *to.at(first + i, column) = element_of<T>(x[column][i]);
  }
}

// -- tiles with one column per lane: rows of gradients

/// to[row][column, ...] = value, where the row has those columns.
template <int COLUMNS, class M> INLINE void write_row(const M& to, int row, int column, Floats value) {
  using T = typename M::Element;
  UNROLL for (int p = 0; p < PARTS; ++p) {
    const int start = column + p * WIDTH;
    if (to.column_stride == 1) store_vector(to.at(row, start), value.part[p], COLUMNS % LANES ? COLUMNS - start : WIDTH);
    else for (int i = 0; i < WIDTH && start + i < COLUMNS; ++i) *to.at(row, start + i) = element_of<T>(value.part[p][i]);
  }
}

/// to[row][column, ...] += value, where the row has those columns.
template <int COLUMNS, class M> INLINE void add_row(const M& to, int row, int column, Floats value) {
  using T = typename M::Element;
  if (M::SCATTERED && row + ROWS < to.rows)  // one of the next block of rows
    UNROLL for (int p = 0; p < PARTS; ++p) __builtin_prefetch(to.at(row + ROWS, column + p * WIDTH), 1);
  UNROLL for (int p = 0; p < PARTS; ++p) {
    const int start = column + p * WIDTH;
    if (std::is_same_v<T, Real> && to.column_stride == 1 && start + WIDTH <= COLUMNS) {
      *(FloatVector*)to.at(row, start) += value.part[p];
    } else {
      for (int i = 0; i < WIDTH && start + i < COLUMNS; ++i) {
        T& element = *to.at(row, start + i);
        element = element_of<T>(value_of(element) + value.part[p][i]);
      }
    }
  }
}

// -- the micro-kernel

/// sums[r] += sum over k of a[r, k] * b[k]: numbers of `a` by any two strides, lanes of `b` by one. ROWS * PARTS
/// accumulators stay in registers; nothing is packed.
INLINE void multiply_add(Floats (&sums)[ROWS], int depth, const Real* a, int64_t row_stride, int64_t depth_stride,
                         const Real* b, int64_t lanes_stride) {
  Floats registers[ROWS];  // `sums` itself is memory where a loop indexes it
  UNROLL for (int r = 0; r < ROWS; ++r) registers[r] = sums[r];
  for (int k = 0; k < depth; ++k) {
    const Floats lanes = load(b);
    UNROLL for (int r = 0; r < ROWS; ++r) {
      const Real number = a[r * row_stride];
      UNROLL for (int p = 0; p < PARTS; ++p) registers[r].part[p] = fma(number, lanes.part[p], registers[r].part[p]);
    }
    a += depth_stride, b += lanes_stride;
  }
  UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = registers[r];
}

/// The same with one register of lanes and as many rows as there are accumulators: for products of which a part is left out.
INLINE void multiply_add(FloatVector (&sums)[ACCUMULATORS], int depth, const Real* a, int64_t row_stride,
                         int64_t depth_stride, const Real* b, int64_t lanes_stride) {
  FloatVector registers[ACCUMULATORS];
  UNROLL for (int r = 0; r < ACCUMULATORS; ++r) registers[r] = sums[r];
  for (int k = 0; k < depth; ++k) {
    const FloatVector lanes = *(const FloatVector*)b;
    UNROLL for (int r = 0; r < ACCUMULATORS; ++r) registers[r] = fma(a[r * row_stride], lanes, registers[r]);
    a += depth_stride, b += lanes_stride;
  }
  UNROLL for (int r = 0; r < ACCUMULATORS; ++r) sums[r] = registers[r];
}

}  // namespace attention
