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

constexpr int BLOCK = 16;  // tokens between two borders, and what the tokens of a chunk are rounded up to

/// exp of a number for each token.
template <int C> INLINE void exponentials(Real* to, const Real* x) {
  for (int i = 0; i < C; i += WIDTH) put(to + i, exp_vector(vector_at(x + i)));
}

/// The running sums G of a chunk's decays, e^{G_end - G} and e^{G_end}.
template <int C> INLINE void sum_decays(const Real* decay, int rows, RunningSum<C>& sums, Real* writes, Real& whole) {
  double total = 0, after = 0;
  for (int i = 0, last = C - 1; i < C; ++i, --last) {  // from both ends at once
    sums.high_before[i] = i ? sums.high[i - 1] : 0, sums.low_before[i] = i ? sums.low[i - 1] : 0;
    total += i < rows ? decay[i] : 0;
    sums.high[i] = (Real)total, sums.low[i] = (Real)(total - (double)sums.high[i]);
    writes[last] = (Real)after, after += last < rows ? decay[last] : 0;
  }
  exponentials<C>(writes, writes);
  whole = exp_vector((Real)total - FloatVector{})[0];
}
/// e^G, or e^G without the token's own decay.
template <bool EXCLUSIVE, int C> INLINE void read_factors(Real* reads, const RunningSum<C>& sums) {
  exponentials<C>(reads, EXCLUSIVE ? sums.high_before : sums.high);
}

/// What is left of token j at token i: between[j][i] = e^{G_i - G_j} for j <= i, or e^{G_{i-1} - G_j} for j < i; else 0.
/// Tokens of two blocks meet at the border before the later one: one exponential for each of them, not for each pair.
template <bool EXCLUSIVE, int C> OUTLINE void decay_matrix(Real (*between)[C], const RunningSum<C>& sums, int rows) {
  const Real *high = EXCLUSIVE ? sums.high_before : sums.high, *low = EXCLUSIVE ? sums.low_before : sums.low;
  alignas(64) Real upto[C];
  const auto power = [&](int i, Real from_high, Real from_low) {
    return (vector_at(high + i) - from_high) + (vector_at(low + i) - from_low);
  };
  for (int first = 0; first < rows; first += BLOCK) {
    const Real border = sums.high_before[first], border_low = sums.low_before[first];
    for (int j = 0; j < first; j += WIDTH)
      put(upto + j, exp_vector((border - vector_at(sums.high + j)) + (border_low - vector_at(sums.low + j))));
    for (int i = first; i < first + BLOCK; i += WIDTH) {
      const FloatVector from = exp_vector(power(i, border, border_low));
      for (int j = 0; j < first; ++j) put(between[j] + i, from * upto[j]);
      for (int j = first; j < first + BLOCK; ++j) {
        const IntVector reads = EXCLUSIVE ? steps_from(i) > j : steps_from(i) >= j;
        put(between[j] + i, exp_vector(reads ? power(i, sums.high[j], sums.low[j]) : -INFINITY - FloatVector{}));
      }
      for (int j = first + BLOCK; j < rows; ++j) put(between[j] + i, FloatVector{});
    }
  }
}

// -- how the weight of token j for the tokens i in lanes depends on their distance

template <bool STRICT> INLINE IntVector reads_token(int j, int column) {
  return STRICT ? steps_from(column) > j : steps_from(column) >= j;
}
struct NoDecay {
  inline __attribute__((always_inline)) FloatVector operator()(int, int) const { return 1 - FloatVector{}; }
};
template <int C> struct TokenDecay {
  const Real (*between)[C];
  inline __attribute__((always_inline)) FloatVector operator()(int j, int column) const { return vector_at(between[j] + column); }
};

/// to[j][i] = x_i . y_j * factor, zero where token i does not read token j. spare holds x transposed.
template <bool STRICT, bool NEGATIVE, int N, int C, class Decay>
OUTLINE void gram(Real (*to)[C], const Real (*x)[N], const Real (*y)[N], Real (*spare)[C], int rows, int dims, Decay decay) {
#if defined(PAIRED_PRODUCTS)
  transpose_pairs((Pair(*)[C])spare, x[0], N, rows, dims);
  const Numbers numbers(ROOM_FOR_PAIRS(room_for_numbers(rows, dims)), y[0], N, 1, rows, dims);
#else
  transpose_rows(spare, x, rows, dims);
#endif
  for (int column = 0; column < rows; column += WIDTH)
    for (int block = 0; block < rows; block += ACCUMULATORS) {
      FloatVector sums[ACCUMULATORS] = {};
      const bool meet = column + WIDTH > block, crossed = column < block + ACCUMULATORS;
#if defined(PAIRED_PRODUCTS)
      const Pair* lanes = (const Pair*)spare[0] + column;
      if (meet) multiply_add(sums, dims, numbers.at(block, 0), numbers.row_stride, numbers.pair_stride, lanes, C);
#else
      if (meet) multiply_add(sums, dims, y[block], N, 1, spare[0] + column, C);
#endif
      UNROLL for (int r = 0; r < ACCUMULATORS; ++r) {
        FloatVector weight = meet ? sums[r] * decay(block + r, column) : FloatVector{};
        if (crossed) weight = reads_token<STRICT>(block + r, column) ? weight : FloatVector{};
        put(to[block + r] + column, NEGATIVE ? -weight : weight);
      }
    }
}

/// From d_matrix: d_x, d_y, and for each token t the sum of d_matrix * matrix over the pairs j < t <= i (exclusive: t < i).
template <bool STRICT, bool EXCLUSIVE, int N, int C, class Decay>
OUTLINE void gram_gradient(Real (*d_matrix)[C], const Real (*matrix)[C], const Real (*x)[N], const Real (*y)[N],
                           Real (*d_x)[N], Real (*d_y)[N], int rows, Decay decay, Real* d_decay) {
  alignas(64) Real earlier[C] = {};  // for each token i: the sum over the tokens j before t
  for (int j = 0; j < rows; ++j) {
    FloatVector crossing{};
    for (int column = j / WIDTH * WIDTH; column < rows; column += WIDTH) {
      const FloatVector d = vector_at(d_matrix[j] + column);
      if (d_decay) {
        const FloatVector before = vector_at(earlier + column);
        crossing += reads_token<EXCLUSIVE>(j, column) ? before : FloatVector{};
        put(earlier + column, before + (reads_token<true>(j, column) ? d * vector_at(matrix[j] + column) : FloatVector{}));
      }
      const FloatVector weighted = d * decay(j, column);
      put(d_matrix[j] + column, reads_token<STRICT>(j, column) ? weighted : FloatVector{});
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
