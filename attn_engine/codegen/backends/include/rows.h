// Few query rows: keys and columns in lanes. Rows of K and V are read in place, each once for all query rows, and are
// converted on the way into registers: with one query row these products run as fast as memory delivers.
#pragma once
#include "tiles.h"

namespace attention {

constexpr int smaller_of(int a, int b) { return a < b ? a : b; }
constexpr int at_least_one(int n) { return n < 1 ? 1 : n; }

constexpr int AHEAD = 32;  // rows between the one that is read and the one that is asked for (8 to 128 measured)

/// Asks for the line of a row that begins at this column, if one does. Not for the first cache: rows of one head lie far
/// apart, and share so few sets of it that they would throw each other out before they are read.
template <class T> INLINE void ask_for_line(const T* row, int column) {
  if (column * (int)sizeof(T) % 64 == 0) __builtin_prefetch(row + column, 0, 2);
}

template <class T> INLINE Matrix<T> from_row(const Matrix<T>& x, int first) {
  return {x.at(first, 0), x.row_stride, x.column_stride, x.rows - first};
}

/// Rows of a tile, and where the next one lies that no prefetcher guesses: each of its rows is asked for while one of
/// these is read. `next`: rows from the first of these to the first of that.
template <class T> struct MatrixBefore : Matrix<T> {
  int64_t next;
  const T* other(int64_t row) const { return this->at(next + row < this->rows ? next + row : this->rows - 1, 0); }
};

template <class M> constexpr bool BEFORE_OTHER = false;
template <class T> constexpr bool BEFORE_OTHER<MatrixBefore<T>> = true;

template <class T> INLINE MatrixBefore<T> from_row(const Matrix<T>& x, int first, int next) {
  return {from_row(x, first), next - first};
}

/// Where rows are asked for as they are read, what lies after the tile is not.
template <class M> INLINE M from_row(const M& x, int first, int) { return from_row(x, first); }

/// The row to ask for while this one is read.
template <class M> INLINE auto row_ahead(const M& x, int row) {
  if constexpr (BEFORE_OTHER<M>) return x.other(row);
  else return x.at(min(row + AHEAD, (int)x.rows - 1), 0);
}

/// Asks for a row that is to be copied, with its scales.
template <int COLUMNS, class M> INLINE void ask_for_row(const M& x, int row) {
  fetch_rows<COLUMNS>(x, row, 1);
  if constexpr (SCALED<M>) fetch_rows<1>(x.scales, row, 1);
}

// -- a row as vectors: slices of WIDTH columns; where the width does not divide the row, the last slice ends with the row

template <int COLUMNS> constexpr int SLICES = (COLUMNS + WIDTH - 1) / WIDTH;
template <int COLUMNS> constexpr int OVERLAP = COLUMNS < WIDTH ? 0 : SLICES<COLUMNS> * WIDTH - COLUMNS;

template <int COLUMNS> INLINE int slice_start(int slice) {
  return slice * WIDTH - (slice == SLICES<COLUMNS> - 1 ? OVERLAP<COLUMNS> : 0);
}

/// Zero in the lanes of the last slice that belong to the slice before it.
template <int COLUMNS> INLINE FloatVector without_overlap(FloatVector v, int slice) {
  if (OVERLAP<COLUMNS> == 0 || slice < SLICES<COLUMNS> - 1) return v;
  IntVector own;
  UNROLL for (int i = 0; i < WIDTH; ++i) own[i] = i < OVERLAP<COLUMNS> ? 0 : -1;
  return (FloatVector)((IntVector)v & own);
}

template <int COLUMNS, class T> INLINE FloatVector load_slice(const T* row, int slice) {
  if constexpr (COLUMNS < WIDTH) {
    T padded[WIDTH] = {};
    __builtin_memcpy((void*)padded, row, COLUMNS * sizeof(T));
    return load_vector(padded);
  } else {
    return load_vector(row + slice_start<COLUMNS>(slice));
  }
}

/// to[row] = slices of x[first + row] * factor; rows from `count` on are zero.
template <int COLUMNS, int QUERIES, int PADDED, class M>
OUTLINE void pack_rows(Real (&to)[QUERIES][PADDED], const M& x, int first, int count, Real factor) {
  for (int row = 0; row < QUERIES; ++row) {
    Real numbers[COLUMNS] = {};
    if (row < count) read_row(numbers, x, first + row, COLUMNS);
    for (int s = 0; s < SLICES<COLUMNS>; ++s)
      *(FloatVector*)(to[row] + s * WIDTH) = without_overlap<COLUMNS>(load_slice<COLUMNS>(numbers, s), s) * factor;
  }
}

// -- across lanes

/// Lane l of the result is a[l] + a[l ^ STEP] where l has no bit STEP, else b[l] + b[l ^ STEP].
template <int STEP> INLINE FloatVector add_neighbours(FloatVector a, FloatVector b) {
  IntVector here, there;
  UNROLL for (int l = 0; l < WIDTH; ++l) {
    here[l] = l & STEP ? WIDTH + l : l;
    there[l] = here[l] ^ STEP;
  }
#if defined(__clang__)
  FloatVector x, y;
  UNROLL for (int l = 0; l < WIDTH; ++l) {
    x[l] = l & STEP ? b[l] : a[l];
    y[l] = l & STEP ? b[l ^ STEP] : a[l ^ STEP];
  }
  return x + y;
#else
  return __builtin_shuffle(a, b, here) + __builtin_shuffle(a, b, there);
#endif
}

/// Lane i of the result is the sum of v[i]'s lanes: a tree, in which vectors are halved and joined.
template <int STEP = WIDTH / 2> INLINE FloatVector sums_of(FloatVector (&v)[WIDTH]) {
  UNROLL for (int i = 0; i < STEP; ++i) v[i] = add_neighbours<STEP>(v[i], v[i + STEP]);
  if constexpr (STEP > 1) return sums_of<STEP / 2>(v);
  else return v[0];
}

/// Lane l of the result is x[l ^ STEP].
template <int STEP> INLINE FloatVector swapped(FloatVector x) {
  FloatVector result;
#if defined(__clang__)
  UNROLL for (int l = 0; l < WIDTH; ++l) result[l] = x[l ^ STEP];
#else
  IntVector from;
  UNROLL for (int l = 0; l < WIDTH; ++l) from[l] = l ^ STEP;
  result = __builtin_shuffle(x, from);
#endif
  return result;
}

template <int STEP = WIDTH / 2, class F> INLINE Real fold_vector(FloatVector x, F f) {
  if constexpr (STEP == 0) return x[0];
  else return fold_vector<STEP / 2>(f(x, swapped<STEP>(x)), f);
}

template <class F> INLINE Real fold_halves(Floats x, F f) {
  UNROLL for (int n = PARTS / 2; n > 0; n /= 2)
    UNROLL for (int i = 0; i < n; ++i) x.part[i] = f(x.part[i], x.part[i + n]);
  return fold_vector(x.part[0], f);
}
INLINE Real sum_lanes(Floats x) { return fold_halves(x, [](FloatVector a, FloatVector b) { return a + b; }); }
INLINE Real max_lanes(Floats x) { return fold_halves(x, [](FloatVector a, FloatVector b) { return a > b ? a : b; }); }
INLINE Real min_lanes(Floats x) { return fold_halves(x, [](FloatVector a, FloatVector b) { return a < b ? a : b; }); }

// -- row after row, and for each the one to ask for while it is read

/// Rows `stride` apart.
template <class T> struct StridedWalk {
  const T *row, *next;
  int64_t stride;
  const T* here() const { return row; }
  const T* ahead() const { return next; }
  void go_on() { row += stride, next += stride; }
};

/// Rows that lie anywhere.
template <class T> struct ListedWalk {
  const T* const* rows;
  const T* here() const { return rows[0]; }
  const T* ahead() const { return rows[AHEAD]; }
  void go_on() { ++rows; }
};

// -- query . key: the columns of both in lanes

/// sums[r * KEYS + j] += query[r] . key[j] over COUNT slices from `first` on, key after key: the processor overlaps the
/// sums of neighbouring keys. For each key a row ahead is asked for, one line at a time: a whole row at once, or 16 of
/// them, would wait for each other.
template <int COLUMNS, int QUERIES, int COUNT, int PADDED, class Walk>
INLINE void multiply_slices(FloatVector (&sums)[WIDTH], const Real (*query)[PADDED], Walk keys, int first) {
  constexpr int KEYS = WIDTH / QUERIES;
  FloatVector numbers[QUERIES][COUNT];
  UNROLL for (int r = 0; r < QUERIES; ++r)
    UNROLL for (int c = 0; c < COUNT; ++c) numbers[r][c] = *(const FloatVector*)(query[r] + (first + c) * WIDTH);
  UNROLL for (int j = 0; j < KEYS; ++j, keys.go_on()) {
    const auto *key = keys.here(), *next = keys.ahead();
    UNROLL for (int c = 0; c < COUNT; ++c) {
      ask_for_line(next, (first + c) * WIDTH);
      const FloatVector columns = without_overlap<COLUMNS>(load_slice<COLUMNS>(key, first + c), first + c);
      UNROLL for (int r = 0; r < QUERIES; ++r) sums[r * KEYS + j] = fma(numbers[r][c], columns, sums[r * KEYS + j]);
    }
  }
}

/// scores[r][j] for QUERIES rows r and as many keys j as fill a vector with results: an accumulator for each pair.
template <int COLUMNS, int QUERIES, int PADDED, int LENGTH, class Walk>
INLINE void multiply_keys(Real (*scores)[LENGTH], const Real (*query)[PADDED], Walk keys) {
  constexpr int KEYS = WIDTH / QUERIES, AT_ONCE = at_least_one(ROWS / QUERIES);
  constexpr int REST = (SLICES<COLUMNS> - 1) % AT_ONCE + 1;  // with the last slice, which may need a mask
  FloatVector sums[WIDTH] = {};
  int first = 0;
  for (; first < SLICES<COLUMNS> - REST; first += AT_ONCE)
    multiply_slices<COLUMNS, QUERIES, AT_ONCE>(sums, query, keys, first);
  multiply_slices<COLUMNS, QUERIES, REST>(sums, query, keys, SLICES<COLUMNS> - REST);
  Real results[WIDTH];
  *(FloatVector*)results = sums_of(sums);
  UNROLL for (int r = 0; r < QUERIES; ++r) __builtin_memcpy(scores[r], results + r * KEYS, KEYS * sizeof(Real));
}

/// scores[r][j] = query[r] . key j for as many keys as results fill a vector, for all query rows.
template <int COLUMNS, int QUERIES, int PADDED, int LENGTH, class Walk>
INLINE void multiply_rows(Real (&scores)[QUERIES][LENGTH], const Real (&query)[QUERIES][PADDED], int j, Walk keys) {
  constexpr int TOGETHER = smaller_of(QUERIES, WIDTH);
  for (int r = 0; r < QUERIES; r += TOGETHER)
    multiply_keys<COLUMNS, TOGETHER>((Real(*)[LENGTH])(scores[r] + j), query + r, keys);
}

/// scores[r][j] = query[r] . keys[j] for j < count; zero in the rest of the last vector.
template <int COLUMNS, int QUERIES, int PADDED, int LENGTH, class M>
OUTLINE void inner_products(Real (&scores)[QUERIES][LENGTH], const Real (&query)[QUERIES][PADDED], const M& keys,
                            int count) {
  using T = typename M::Element;
  constexpr int KEYS = WIDTH / smaller_of(QUERIES, WIDTH);
  int j = 0;
  if (!SCALED<M> && keys.column_stride == 1) {
    if constexpr (SCALED<M>) {
    } else if constexpr (M::IN_PAGES) {
      const T* rows[LENGTH + AHEAD];
      keys.addresses(rows, round_up(count, KEYS) + AHEAD);
      if constexpr (M::TOGETHER % KEYS != 0) {
        for (; j < count; j += KEYS) multiply_rows<COLUMNS>(scores, query, j, ListedWalk<T>{rows + j});
      } else if (keys.in_steps(0, KEYS)) {  // as are the next ones
        for (; j + KEYS <= count; j += KEYS)
          multiply_rows<COLUMNS>(scores, query, j, StridedWalk<T>{rows[j], rows[j + AHEAD], keys.row_stride});
      }
    } else {
      for (; j + KEYS <= count; j += KEYS)
        multiply_rows<COLUMNS>(scores, query, j, StridedWalk<T>{keys.at(j, 0), row_ahead(keys, j), keys.row_stride});
    }
  }
  for (; j < count; j += KEYS) {
    Real copied[KEYS][COLUMNS];
    for (int i = 0; i < KEYS; ++i) {
      ask_for_row<COLUMNS>(keys, j + i + AHEAD);
      read_row(copied[i], keys, min(j + i, count - 1), COLUMNS);
    }
    multiply_rows<COLUMNS>(scores, query, j, StridedWalk<Real>{copied[0], copied[0], COLUMNS});
  }
  for (int r = 0; r < QUERIES; ++r)
    for (j = count; j < round_up(count, LANES); ++j) scores[r][j] = 0;
}

// -- weights . value: numbers times rows, the columns in lanes

/// A row, and the one to ask for while it is read.
template <class T> struct RowPair { const T *here, *next; };

/// out[r][slices] += sum over j of weights[r][j] * row(j)[slices], for COUNT slices. The depth is shared between as
/// many accumulators as there are registers for: one row and few columns would wait for each addition otherwise.
template <int COLUMNS, int QUERIES, int COUNT, int PADDED, int LENGTH, class R>
INLINE void add_slices(Real (&out)[QUERIES][PADDED], const Real (&weights)[QUERIES][LENGTH], R row, int count,
                       int first) {
  constexpr int SHARES = at_least_one(ACCUMULATORS / (COUNT * QUERIES));
  FloatVector sums[SHARES][QUERIES][COUNT] = {};
  const auto add_row = [&](int j, int share) __attribute__((always_inline)) {
    const auto [here, next] = row(j);
    UNROLL for (int c = 0; c < COUNT; ++c) {
      if (first == 0)
        UNROLL for (int s = c; s < SLICES<COLUMNS>; s += COUNT) ask_for_line(next, s * WIDTH);
      const FloatVector columns = load_slice<COLUMNS>(here, first + c);
      UNROLL for (int r = 0; r < QUERIES; ++r) sums[share][r][c] = fma(weights[r][j], columns, sums[share][r][c]);
    }
  };
  int j = 0;
  for (; j + SHARES <= count; j += SHARES)
    UNROLL for (int share = 0; share < SHARES; ++share) add_row(j + share, share);
  for (; j < count; ++j) add_row(j, 0);
  UNROLL for (int r = 0; r < QUERIES; ++r)
    UNROLL for (int c = 0; c < COUNT; ++c) {
      FloatVector total = sums[0][r][c];
      UNROLL for (int share = 1; share < SHARES; ++share) total += sums[share][r][c];
      *(FloatVector*)(out[r] + slice_start<COLUMNS>(first + c)) += without_overlap<COLUMNS>(total, first + c);
    }
}

template <int COLUMNS, int QUERIES, int PADDED, int LENGTH, class R>
INLINE void add_rows(Real (&out)[QUERIES][PADDED], const Real (&weights)[QUERIES][LENGTH], R row, int count) {
  constexpr int AT_ONCE = smaller_of(SLICES<COLUMNS>, at_least_one(ACCUMULATORS / QUERIES));
  constexpr int REST = SLICES<COLUMNS> % AT_ONCE;
  int first = 0;
  for (; first + AT_ONCE <= SLICES<COLUMNS> - REST; first += AT_ONCE)
    add_slices<COLUMNS, QUERIES, AT_ONCE>(out, weights, row, count, first);
  if constexpr (REST > 0) add_slices<COLUMNS, QUERIES, REST>(out, weights, row, count, first);
}

constexpr int COPIED = 16;  // rows that are converted at once

/// out[r] += sum over j < count of weights[r][j] * values[j], of rows that cannot be read in place.
template <int COLUMNS, int QUERIES, int PADDED, int LENGTH, class M>
INLINE void add_copies(Real (&out)[QUERIES][PADDED], const Real (&weights)[QUERIES][LENGTH], const M& values, int count) {
  for (int j = 0; j < count; j += COPIED) {
    const int rows = min(COPIED, count - j);
    Real copied[COPIED][COLUMNS], weight[QUERIES][COPIED];
    for (int i = 0; i < rows; ++i) {
      ask_for_row<COLUMNS>(values, j + i + AHEAD);
      read_row(copied[i], values, j + i, COLUMNS);
      for (int r = 0; r < QUERIES; ++r) weight[r][i] = weights[r][j + i];
    }
    add_rows<COLUMNS>(out, weight, [&](int i) { return RowPair<Real>{copied[i], copied[i]}; }, rows);
  }
}

/// out[r] += sum over j < count of weights[r][j] * values[j].
template <int COLUMNS, int QUERIES, int PADDED, int LENGTH, class M>
OUTLINE void add_products(Real (&out)[QUERIES][PADDED], const Real (&weights)[QUERIES][LENGTH], const M& values,
                          int count) {
  if constexpr (!SCALED<M>)
    if (values.column_stride == 1) {
      using T = typename M::Element;
      if constexpr (M::IN_PAGES) {
        const T* rows[LENGTH + AHEAD];
        values.addresses(rows, count + AHEAD);
        add_rows<COLUMNS>(out, weights, [&](int j) { return RowPair<T>{rows[j], rows[j + AHEAD]}; }, count);
      } else {
        const T* first = values.at(0, 0);
        const auto row = [&](int j) { return RowPair<T>{first + j * values.row_stride, row_ahead(values, j)}; };
        add_rows<COLUMNS>(out, weights, row, count);
      }
      return;
    }
  add_copies<COLUMNS>(out, weights, values, count);
}

}  // namespace attention
