// One decay for each token: factors inside a chunk, the Gram matrix that decays, and its gradient. Every exponent is a sum
// of decays, at most 0; a mask is inside the exponent; no gradient is a difference of large parts.
#pragma once
#include "chunks.h"

namespace attention {

/// A running sum as two numbers each, so that a small decay after a large one is not lost in a difference. The second pair
/// is that of the token before: what a token that reads before its own step has.
template <int C> struct RunningSum {
  alignas(64) Real high[C], low[C], high_before[C], low_before[C];
};

/// exp of a number for each token.
template <int C> INLINE void exponentials(Real* to, const Real* x) {
  for (int i = 0; i < C; i += LANES) store(to + i, exp(load(x + i)));
}

/// The running sums G of a chunk's decays, e^{G_end - G} and e^{G_end}.
template <int C> INLINE void sum_decays(const Real* decay, int rows, RunningSum<C>& sums, Real* writes, Real& whole) {
  double total = 0, after = 0;
  for (int i = 0; i < C; ++i) {
    sums.high_before[i] = i ? sums.high[i - 1] : 0, sums.low_before[i] = i ? sums.low[i - 1] : 0;
    total += i < rows ? decay[i] : 0;
    sums.high[i] = (Real)total, sums.low[i] = (Real)(total - (double)sums.high[i]);
  }
  for (int i = C - 1; i >= 0; --i) writes[i] = (Real)after, after += i < rows ? decay[i] : 0;
  exponentials<C>(writes, writes);
  whole = exp(fill((Real)total)).part[0][0];
}
/// e^G, or e^G without the token's own decay.
template <bool EXCLUSIVE, int C> INLINE void read_factors(Real* reads, const RunningSum<C>& sums) {
  exponentials<C>(reads, EXCLUSIVE ? sums.high_before : sums.high);
}

// -- how the weight of token j for the tokens i in lanes depends on their distance

template <bool STRICT> INLINE Mask reads_token(int j, int column) {
  const Positions i = positions(column);
  return STRICT ? j < i : j <= i;
}
struct NoDecay {
  template <bool STRICT> inline __attribute__((always_inline)) Floats factors(int j, int column) const {
    return where(reads_token<STRICT>(j, column), Real(1), Real(0));
  }
};
template <bool EXCLUSIVE, int C> struct TokenDecay {
  const RunningSum<C>& sums;
  /// e^{G_i - G_j}, or e^{G_{i-1} - G_j}; 0 where token i does not read token j.
  template <bool STRICT> inline __attribute__((always_inline)) Floats factors(int j, int column) const {
    const Real *high = EXCLUSIVE ? sums.high_before : sums.high, *low = EXCLUSIVE ? sums.low_before : sums.low;
    const Floats power = (load(high + column) - sums.high[j]) + (load(low + column) - sums.low[j]);
    return exp(where(reads_token<STRICT>(j, column), power, -INFINITY));
  }
};

/// to[j][i] = x_i . y_j * factor, zero where token i does not read token j. spare holds x transposed.
template <bool STRICT, bool NEGATIVE, int N, int C, class Decay>
OUTLINE void gram(Real (*to)[C], const Real (*x)[N], const Real (*y)[N], Real (*spare)[C], int rows, int dims, Decay decay) {
  transpose_rows(spare, x, rows, dims);
  if (rows % LANES)
    for (int d = 0; d < dims; ++d) __builtin_memset(spare[d] + rows, 0, (round_up(rows, LANES) - rows) * sizeof(Real));
  for (int column = 0; column < C; column += LANES)
    for (int block = 0; block < rows; block += ROWS) {
      if (column + LANES <= block || column >= rows) {
        UNROLL for (int r = 0; r < ROWS; ++r) store(to[block + r] + column, fill(0));
        continue;
      }
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0);
      multiply_add(sums, dims, y[block], N, 1, spare[0] + column, C);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        const Floats weight = sums[r] * decay.template factors<STRICT>(block + r, column);
        store(to[block + r] + column, NEGATIVE ? -weight : weight);
      }
    }
}

/// From d_matrix: d_x, d_y, and for each token t the sum of d_matrix * matrix over the pairs j < t <= i (exclusive: t < i).
template <bool STRICT, bool EXCLUSIVE, int N, int C, class Decay>
OUTLINE void gram_gradient(Real (*d_matrix)[C], const Real (*matrix)[C], const Real (*x)[N], const Real (*y)[N],
                           Real (*d_x)[N], Real (*d_y)[N], int rows, Decay decay, Real* d_decay) {
  alignas(64) Real earlier[C] = {};  // for each token i: the sum over the tokens j before t
  for (int j = 0; j < rows; ++j) {
    Floats crossing = fill(0);
    for (int column = j / LANES * LANES; column < rows; column += LANES) {
      const Floats d = load(d_matrix[j] + column);
      if (d_decay) {
        crossing = crossing + where(reads_token<EXCLUSIVE>(j, column), load(earlier + column), Real(0));
        const Floats pair = where(reads_token<true>(j, column), d * load(matrix[j] + column), Real(0));
        store(earlier + column, load(earlier + column) + pair);
      }
      store(d_matrix[j] + column, d * decay.template factors<STRICT>(j, column));
    }
    if (d_decay) d_decay[j] += total_of(crossing);
  }
  product<Set::ADD, Depth::UP_TO_ROW>(d_x, rows, rows, d_matrix[0], 1, C, y);
  product<Set::ADD, Depth::FROM_ROW>(d_y, rows, rows, d_matrix[0], C, 1, x);
}

/// x_row . y_row for every token.
template <int N> INLINE void row_products(Real* to, const Real (*x)[N], const Real (*y)[N], int rows) {
  for (int row = 0; row < rows; ++row) {
    Floats total = fill(0);
    for (int column = 0; column < N; column += LANES) total = fma(load(x[row] + column), load(y[row] + column), total);
    to[row] = total_of(total);
  }
}

/// <x, y> over `rows` rows.
template <int N> INLINE Real inner_product(const Real (*x)[N], const Real (*y)[N], int rows) {
  double total = 0;
  for (int row = 0; row < rows; ++row) {
    Floats sum = fill(0);
    for (int column = 0; column < N; column += LANES) sum = fma(load(x[row] + column), load(y[row] + column), sum);
    total += total_of(sum);
  }
  return (Real)total;
}

/// d_decay_t = whole * <state, d_state> + the sum of keys_j . d_keys_j over j < t.
template <int N, int V>
OUTLINE void carried_gradient(Real* d_decay, const Real (*keys)[N], const Real (*d_keys)[N], const Real (*state)[V],
                              const Real (*d_state)[V], int dims, Real whole, int rows) {
  row_products(d_decay, keys, d_keys, rows);
  Real total = whole * inner_product(state, d_state, dims);
  for (int t = 0; t < rows; ++t) {
    const Real own = d_decay[t];
    d_decay[t] = total, total += own;
  }
}
/// d_decay_t += the sum of x_i . d_x_i over i >= t (exclusive: i > t).
template <bool EXCLUSIVE, int N>
OUTLINE void add_reads(Real* d_decay, const Real (*x)[N], const Real (*d_x)[N], int rows) {
  Real total = 0;
  for (int t = rows - 1; t >= 0; --t) {
    Floats own = fill(0);
    for (int column = 0; column < N; column += LANES) own = fma(load(x[t] + column), load(d_x[t] + column), own);
    if (EXCLUSIVE) d_decay[t] += total;
    total += total_of(own);
    if (!EXCLUSIVE) d_decay[t] += total;
  }
}

// -- what is no decay

INLINE bool is_decay(Real x) { return x <= 0 && x > -INFINITY; }
/// The first token whose decay is above 0, -inf or NaN: 2 * (token + 1), and 1 more for -inf; else 0.
template <int N> INLINE int64_t fault_in(const Real (*decay)[N], int count) {
  for (int row = 0; row < count; ++row) {
    Floats bad = fill(0);
    for (int column = 0; column < N; column += LANES) {
      const Floats x = load(decay[row] + column);
      bad = bad + where((x <= Real(0)) & (-INFINITY < x), Real(0), Real(1));
    }
    if (total_of(bad) > 0)
      for (int column = 0; column < N; ++column)
        if (!is_decay(decay[row][column])) return 2 * (row + 1) + (decay[row][column] == -INFINITY);
  }
  return 0;
}
INLINE int64_t fault_in(const Real* decay, int count) {
  for (int row = 0; row < count; ++row)
    if (!is_decay(decay[row])) return 2 * (row + 1) + (decay[row] == -INFINITY);
  return 0;
}

}  // namespace attention
