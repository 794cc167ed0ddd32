// Chunks of tokens of a linear attention: products, the solve with a unit lower triangle, the step of the state.
// A tile is an array of rows with all columns up to a multiple of LANES; what lies beyond a chunk's tokens and beyond the
// dimensions is zero. A matrix of tokens is held transposed: [j][i] is the weight of token j for token i.
#pragma once
#include "chunk_pairs.h"

namespace attention {

/// A number for each of the tokens of a chunk.
template <int TOKENS> using PerToken = Real[TOKENS];

/// The sum of all lanes, always added in the same order.
INLINE Real total_of(FloatVector x) {
#if defined(__AVX512F__) && !defined(COMPUTE_IN_DOUBLE)
  return _mm512_reduce_add_ps((__m512)x);
#else
  Real lane[WIDTH];
  *(FloatVector*)lane = x;
  UNROLL for (int step = WIDTH / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  return lane[0];
#endif
}
INLINE Real total_of(Floats x) {
  FloatVector total = x.part[0];
  UNROLL for (int p = 1; p < PARTS; ++p) total += x.part[p];
  return total_of(total);
}

/// exp in one register.
INLINE FloatVector exp_vector(FloatVector x) {
#if defined(COMPUTE_IN_DOUBLE)
  for (int i = 0; i < WIDTH; ++i) x[i] = exp(x[i]);
  return x;
#else
  return exp(x);
#endif
}
INLINE FloatVector vector_at(const Real* x) { return *(const FloatVector*)x; }
INLINE void put(Real* x, FloatVector v) { *(FloatVector*)x = v; }

/// Positions first, first + 1, ... in one register.
INLINE IntVector steps_from(int first) {
  IntVector x;
  UNROLL for (int i = 0; i < WIDTH; ++i) x[i] = i;
  return x + first;
}

/// Columns of a tensor's row, zero beyond COLUMNS.
template <int COLUMNS, class T> INLINE Floats row_lanes(const Matrix<T>& x, int row, int column) {
  return each<Floats>([&](int p) {
    const int start = column + p * WIDTH;
    if (x.column_stride == 1 && (COLUMNS % LANES == 0 || start + WIDTH <= COLUMNS)) return (FloatVector)load_vector(x.at(row, start));
    FloatVector v{};
    for (int i = 0; i < WIDTH && start + i < COLUMNS; ++i) v[i] = value_of(*x.at(row, start + i));
    return v;
  });
}

template <int N> INLINE void clear_rows(Real (*x)[N], int first, int last) {
  for (int row = first; row < last; ++row) __builtin_memset(x[row], 0, sizeof x[row]);
}

constexpr int TOKENS_AHEAD = 16;  // tokens between asking for a row of a tensor and using it

/// Asks for a row of a tensor. Heads lie between each other, so tokens may be pages apart, which the processor does not
/// foresee. A row that is not there is no harm.
template <int COLUMNS, class T> INLINE void prefetch_row(const Matrix<T>& x, int64_t row) {
  UNROLL for (int column = 0; column < COLUMNS; column += 64 / sizeof(T))
    __builtin_prefetch(x.at(row, column), !std::is_const_v<T>, 3);
}

/// sums[column] += ..., in double: a sum over all tokens of a sequence.
template <int COLUMNS> INLINE void add_total(double* to, const Real* x) {
  for (int i = 0; i < COLUMNS; ++i) to[i] += x[i];
}

/// to[column][row] = x[row][column]; both numbers are taken up to a multiple of WIDTH.
template <int M, int N> OUTLINE void transpose_rows(Real (*to)[M], const Real (*x)[N], int rows, int columns) {
  for (int row = 0; row < rows; row += WIDTH)
    for (int column = 0; column < columns; column += WIDTH) {
      FloatVector square[WIDTH];
      UNROLL for (int i = 0; i < WIDTH; ++i) square[i] = *(const FloatVector*)(x[row + i] + column);
      transpose(square);
      UNROLL for (int i = 0; i < WIDTH; ++i) *(FloatVector*)(to[column + i] + row) = square[i];
    }
}

// -- products

enum class Set { TO, ADD, SUBTRACT, NEGATIVE };  // to = x, to += x, to -= x, to = -x
enum class Depth { ALL, UP_TO_ROW, FROM_ROW };   // which rows of b a row of the product has a part of

/// What a row of a product is multiplied by.
struct Whole {
  Floats operator()(int, Floats x) const { return x; }
};
struct RowFactor {
  const Real* by;
  inline __attribute__((always_inline)) Floats operator()(int row, Floats x) const { return x * by[row]; }
};

/// to[row] (set) factor(row) * sum over k of a(row, k) * b[k]; numbers of `a` by any two strides.
/// Where b holds pairs of rows already, they are not packed again.
template <Set SET, Depth DEPTH, int N, class Lane, class Factor = Whole>
OUTLINE void product(Real (*to)[N], int rows, int depth, const Real* a, int64_t row_stride, int64_t depth_stride,
                     const Lane (*b)[N], Factor factor = {}) {
#if defined(PAIRED_PRODUCTS)
  constexpr bool packed = std::is_same_v<Lane, Pair>;
  constexpr int lanes_stride = packed ? N : LANES;
  const Numbers numbers(ROOM_FOR_PAIRS(room_for_numbers(rows, depth)), a, row_stride, depth_stride, rows, depth);
  Pair* room = ROOM_FOR_PAIRS(packed ? 0 : (depth + 1) / 2 * LANES);
#endif
  for (int column = 0; column < N; column += LANES) {
#if defined(PAIRED_PRODUCTS)
    const Pair* lanes = room;
    if constexpr (packed) lanes = b[0] + column;
    else pack_pairs(room, LANES, b[0] + column, N, depth, LANES);
#endif
    for (int block = 0; block < rows; block += ROWS) {
      const int first = DEPTH == Depth::FROM_ROW ? block : 0;
      const int last = DEPTH == Depth::UP_TO_ROW ? min(block + ROWS, depth) : depth;
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0);
#if defined(PAIRED_PRODUCTS)
      multiply_add(sums, last - first, numbers.at(block, first), numbers.row_stride, numbers.pair_stride,
                   lanes + first / 2 * lanes_stride, lanes_stride);
#else
      multiply_add(sums, last - first, a + block * row_stride + first * depth_stride, row_stride, depth_stride,
                   b[first] + column, N);
#endif
      UNROLL for (int r = 0; r < ROWS; ++r) {
        Real* place = to[block + r] + column;
        const Floats sum = factor(block + r, sums[r]);
        if (SET == Set::TO) store(place, sum);
        else if (SET == Set::NEGATIVE) store(place, -sum);
        else if (SET == Set::ADD) store(place, load(place) + sum);
        else store(place, load(place) - sum);
      }
    }
  }
}

/// to = x * by, row by row.
template <int N> INLINE void scale_rows(Real (*to)[N], const Real (*x)[N], const Real* by, int rows) {
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < N; column += LANES) store(to[row] + column, load(x[row] + column) * by[row]);
}
template <int N> INLINE void scale_rows(Real (*to)[N], const Real (*x)[N], const Real (*by)[N], int rows) {
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < N; column += LANES)
      store(to[row] + column, load(x[row] + column) * load(by[row] + column));
}

/// state = whole * state (+ or -) keys^T values. Products of pairs: token i of `keys` times by[i], where there is `by`, and
/// the state in pairs of rows once more, where there is room for it.
template <bool NEGATIVE, int N, int D, class Whole>
OUTLINE void state_step(Real (*state)[N], int dims, const Real (*keys)[D], const Real (*values)[N], int rows, Whole whole
#if defined(PAIRED_PRODUCTS)
                        , const Real* by = nullptr, Pair (*state_pairs)[N] = nullptr
#endif
) {
#if defined(PAIRED_PRODUCTS)
  const Numbers numbers(ROOM_FOR_PAIRS(room_for_numbers(dims, rows)), keys[0], D, dims, rows, by);
  Pair* lanes = ROOM_FOR_PAIRS(rows / 2 * LANES);
#endif
  for (int column = 0; column < N; column += LANES) {
#if defined(PAIRED_PRODUCTS)
    pack_pairs(lanes, LANES, values[0] + column, N, rows, LANES);
#endif
    for (int block = 0; block < dims; block += ROWS) {
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0);
#if defined(PAIRED_PRODUCTS)
      multiply_add(sums, rows, numbers.at(block, 0), numbers.row_stride, numbers.pair_stride, lanes, LANES);
#else
      multiply_add(sums, rows, keys[0] + block, 1, D, values[0] + column, N);
#endif
      UNROLL for (int r = 0; r < ROWS; ++r) {
        Real* place = state[block + r] + column;
        const Floats before = load(place) * whole(block + r);
        sums[r] = NEGATIVE ? before - sums[r] : before + sums[r];
        store(place, sums[r]);
      }
#if defined(PAIRED_PRODUCTS)
      if (state_pairs)
        UNROLL for (int r = 0; r + 1 < ROWS; r += 2)
          UNROLL for (int p = 0; p < PARTS; ++p)
            *(PairVector*)(state_pairs[(block + r) / 2] + column + p * WIDTH) = pairs_of(sums[r].part[p], sums[r + 1].part[p]);
#endif
    }
  }
}

/// One token: the state decays (`left` of each row), is cleared of what it holds for `eraser`, written to and read.
template <bool EXCLUSIVE, int V, class Left>
OUTLINE void token_step(Real* to, Real (*state)[V], int dims, const Real* query, const Real* key, const Real* value,
                        const Real* eraser, const Real* bonus, Left left) {
  Real extra = 0;
  for (int d = 0; d < dims && bonus; ++d) extra += query[d] * bonus[d];
  for (int column = 0; column < V; column += LANES) {
    Floats held = fill(0), out = fill(0);
    for (int d = 0; d < dims; ++d) {
      const Floats before = load(state[d] + column), now = before * left(d);
      if (EXCLUSIVE) out = fma(query[d], before, out);
      if (eraser) held = fma(eraser[d], now, held);
      store(state[d] + column, now);
    }
    const Floats written = load(value + column) - held;
    for (int d = 0; d < dims; ++d) {
      const Floats now = fma(key[d], written, load(state[d] + column));
      if (!EXCLUSIVE) out = fma(query[d], now, out);
      store(state[d] + column, now);
    }
    store(to + column, bonus ? fma(extra, written, out) : out);
  }
}

/// (I + L) to = to in place: L strictly lower, held transposed. Blocks of ROWS rows by the micro-kernel.
template <int N, int C> OUTLINE void solve_lower(Real (*to)[N], const Real (*lower)[C], int rows) {
  for (int column = 0; column < N; column += LANES)
    for (int block = 0; block < rows; block += ROWS) {
      Floats sums[ROWS], x[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0);
      multiply_add(sums, block, lower[0] + block, 1, C, to[0] + column, N);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        x[r] = load(to[block + r] + column) - sums[r];
        for (int s = 0; s < r; ++s) x[r] = fma(-lower[block + s][block + r], x[s], x[r]);
        store(to[block + r] + column, x[r]);
      }
    }
}

/// (I + L)^T to = to in place.
template <int N, int C> OUTLINE void solve_upper(Real (*to)[N], const Real (*lower)[C], int rows) {
  for (int column = 0; column < N; column += LANES)
    for (int block = rows - ROWS; block >= 0; block -= ROWS) {
      Floats sums[ROWS], x[ROWS];
      const int after = block + ROWS;
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0);
      multiply_add(sums, rows - after, lower[block] + after, C, 1, to[after] + column, N);
      UNROLL for (int r = ROWS - 1; r >= 0; --r) {
        x[r] = load(to[block + r] + column) - sums[r];
        for (int s = r + 1; s < ROWS; ++s) x[r] = fma(-lower[block + r][block + s], x[s], x[r]);
        store(to[block + r] + column, x[r]);
      }
    }
}

/// matrix[i][i] += x_i . y_i
template <int N, int C> INLINE void add_diagonal(Real (*matrix)[C], const Real (*x)[N], const Real (*y)[N], int rows) {
  for (int row = 0; row < rows; ++row) {
    Floats total = fill(0);
    for (int column = 0; column < N; column += LANES) total = fma(load(x[row] + column), load(y[row] + column), total);
    matrix[row][row] += total_of(total);
  }
}

/// d_x_i += d_matrix[i][i] y_i, d_y_i = d_matrix[i][i] x_i
template <int N, int C>
INLINE void diagonal_gradient(const Real (*d_matrix)[C], const Real (*x)[N], const Real (*y)[N], Real (*d_x)[N],
                              Real (*d_y)[N], int rows) {
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < N; column += LANES) {
      const Real d = d_matrix[row][row];
      store(d_x[row] + column, fma(d, load(y[row] + column), load(d_x[row] + column)));
      store(d_y[row] + column, d * load(x[row] + column));
    }
}

}  // namespace attention
