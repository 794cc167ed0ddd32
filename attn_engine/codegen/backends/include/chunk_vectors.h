// A decay for each token and each dimension. No single factor serves a whole chunk: tokens are taken in blocks of BLOCK.
// Between blocks the weights are a product of two sides, each decayed to the border between them; inside a block the steps
// of single tokens are multiplied out. All factors are at most 1.
#pragma once
#include "chunk_decays.h"

namespace attention {

constexpr int BLOCK_VECTORS = BLOCK / WIDTH;

/// What is reused from block to block: rows decayed to the border, and those of the block in question.
template <int C, int N> struct VectorSpare {
  alignas(64) Real factor[C][N], before[C][N];     // of tokens before the block, and their rows times it
  alignas(64) Real from[BLOCK][N], rows[BLOCK][N];  // of the block's tokens, and their rows times it
  alignas(64) Real turned[N][BLOCK], sums[C][N];
};

INLINE FloatVector ones() { return 1 - FloatVector{}; }

/// The factors of a chunk, column by column; see sum_decays.
template <bool EXCLUSIVE, int N>
OUTLINE void vector_factors(const Real (*decay)[N], int rows, Real (*steps)[N], Real (*reads)[N], Real (*erases)[N],
                            Real (*writes)[N], Real* whole) {
  for (int column = 0; column < N; column += LANES) {
    Floats total = fill(0), after = fill(0);
    for (int i = 0; i < rows; ++i) {
      const Floats g = load(decay[i] + column);
      if (steps) store(steps[i] + column, exp(g));
      if (EXCLUSIVE && reads) store(reads[i] + column, exp(total));
      total = total + g;
      if (!EXCLUSIVE && reads) store(reads[i] + column, exp(total));
      if (erases) store(erases[i] + column, exp(total));
    }
    for (int i = rows - 1; i >= 0; --i) {
      store(writes[i] + column, exp(after));
      after = after + load(decay[i] + column);
    }
    store(whole + column, exp(total));
  }
}

/// The block's rows decayed to the border before it: from[i] = product of the steps up to i (exclusive: before i).
template <bool EXCLUSIVE, int C, int N>
INLINE void rows_from_border(VectorSpare<C, N>& spare, const Real (*x)[N], const Real (*steps)[N], int first) {
  for (int column = 0; column < N; column += WIDTH) {
    FloatVector factor = ones();
    for (int i = 0; i < BLOCK; ++i) {
      if (!EXCLUSIVE) factor *= vector_at(steps[first + i] + column);
      put(spare.from[i] + column, factor);
      put(spare.rows[i] + column, factor * vector_at(x[first + i] + column));
      if (EXCLUSIVE) factor *= vector_at(steps[first + i] + column);
    }
  }
}

/// Move the border of the tokens before it behind the block that begins at `first`.
template <int C, int N>
INLINE void move_border(VectorSpare<C, N>& spare, const Real (*y)[N], const Real (*steps)[N], int first) {
  for (int column = 0; column < N; column += WIDTH) {
    FloatVector factor = ones();
    for (int j = first + BLOCK - 1; j >= first; --j) {
      put(spare.factor[j] + column, factor);
      put(spare.before[j] + column, factor * vector_at(y[j] + column));
      factor *= vector_at(steps[j] + column);
    }
    for (int j = 0; j < first; ++j) {
      put(spare.factor[j] + column, factor * vector_at(spare.factor[j] + column));
      put(spare.before[j] + column, factor * vector_at(spare.before[j] + column));
    }
  }
}

/// to[j][i] = the sum over the dimensions of x_i y_j times what is left of token j at token i; rows is a multiple of BLOCK.
template <bool STRICT, bool EXCLUSIVE, bool NEGATIVE, int N, int C>
OUTLINE void vector_gram(Real (*to)[C], const Real (*x)[N], const Real (*y)[N], const Real (*steps)[N],
                         VectorSpare<C, N>& spare, int rows, int dims) {
  clear_rows(to, 0, rows);
  const Real sign = NEGATIVE ? -1 : 1;
  constexpr int HIGH = ACCUMULATORS / BLOCK_VECTORS;  // tokens j at a time, with the block's tokens i in lanes
  for (int first = 0; first < rows; first += BLOCK) {
    if (first) {
      rows_from_border<EXCLUSIVE>(spare, x, steps, first);
      transpose_rows(spare.turned, spare.rows, BLOCK, dims);
      for (int j = 0; j < first; j += HIGH) {
        FloatVector sums[HIGH][BLOCK_VECTORS] = {};
        for (int d = 0; d < dims; ++d)
          UNROLL for (int r = 0; r < HIGH; ++r)
            UNROLL for (int p = 0; p < BLOCK_VECTORS; ++p)
              sums[r][p] = fma(spare.before[j + r][d], vector_at(spare.turned[d] + p * WIDTH), sums[r][p]);
        UNROLL for (int r = 0; r < HIGH; ++r)
          UNROLL for (int p = 0; p < BLOCK_VECTORS; ++p) put(to[j + r] + first + p * WIDTH, sign * sums[r][p]);
      }
    }
    for (int j = first; j < first + BLOCK; ++j) {
      FloatVector sums[BLOCK] = {};
      for (int column = 0; column < dims; column += WIDTH) {
        FloatVector left = vector_at(y[j] + column);
        if (!STRICT) sums[j - first] += left * vector_at(x[j] + column);
        for (int i = j + 1; i < first + BLOCK; ++i) {
          if (!EXCLUSIVE) left *= vector_at(steps[i] + column);
          sums[i - first] = fma(left, vector_at(x[i] + column), sums[i - first]);
          if (EXCLUSIVE) left *= vector_at(steps[i] + column);
        }
      }
      for (int i = 0; i < BLOCK; ++i) to[j][first + i] = sign * total_of(sums[i]);
    }
    move_border(spare, y, steps, first);
  }
}

/// Gradients of the pairs inside a block: by Horner's rule over the tokens between, so that no factor is divided by.
template <bool STRICT, bool EXCLUSIVE, int N, int C>
INLINE void block_gradient(const Real (*d_matrix)[C], const Real (*x)[N], const Real (*y)[N], const Real (*steps)[N],
                           Real (*d_x)[N], Real (*d_y)[N], Real (*d_decay)[N], int first, int dims) {
  const int end = first + BLOCK;
  for (int column = 0; column < dims; column += WIDTH) {
    for (int i = first; i < end; ++i) {
      FloatVector upto[BLOCK], sum{};  // upto[j]: tokens up to j, decayed to j
      const int last = STRICT ? i - 1 : i;
      for (int j = first; j <= last; ++j) {
        sum = fma(d_matrix[j][i], vector_at(y[j] + column), sum * vector_at(steps[j] + column));
        upto[j - first] = sum;
      }
      const FloatVector row = vector_at(x[i] + column);
      // What is left of a token at i: all steps after it, up to i, or up to i - 1 where the phase is exclusive.
      const FloatVector own = STRICT && !EXCLUSIVE ? vector_at(steps[i] + column) : ones();
      put(d_x[i] + column, vector_at(d_x[i] + column) + sum * own);
      FloatVector left = row;
      for (int t = EXCLUSIVE ? i - 1 : i; t > first; --t) {
        left *= vector_at(steps[t] + column);
        put(d_decay[t] + column, fma(left, upto[t - 1 - first], vector_at(d_decay[t] + column)));
      }
    }
    for (int j = first; j < end; ++j) {
      FloatVector sum{};
      for (int i = end - 1; i > j; --i) {
        if (EXCLUSIVE) sum = fma(d_matrix[j][i], vector_at(x[i] + column), sum * vector_at(steps[i] + column));
        else sum = fma(d_matrix[j][i], vector_at(x[i] + column), sum) * vector_at(steps[i] + column);
      }
      if (!STRICT) sum = fma(d_matrix[j][j], vector_at(x[j] + column), sum);
      put(d_y[j] + column, vector_at(d_y[j] + column) + sum);
    }
  }
}

/// From d_matrix: d_x, d_y and d_decay, as gram_gradient does.
template <bool STRICT, bool EXCLUSIVE, int N, int C>
OUTLINE void vector_gram_gradient(const Real (*d_matrix)[C], const Real (*x)[N], const Real (*y)[N],
                                  const Real (*steps)[N], Real (*d_x)[N], Real (*d_y)[N], Real (*d_decay)[N],
                                  VectorSpare<C, N>& spare, int rows, int dims) {
  for (int first = 0; first < rows; first += BLOCK) {
    block_gradient<STRICT, EXCLUSIVE>(d_matrix, x, y, steps, d_x, d_y, d_decay, first, dims);
    if (first) {
      rows_from_border<EXCLUSIVE>(spare, x, steps, first);
      product<Set::TO, Depth::ALL>(spare.sums, BLOCK, first, d_matrix[0] + first, 1, C, spare.before);
      for (int column = 0; column < dims; column += WIDTH) {
        FloatVector after{};
        for (int i = BLOCK - 1; i >= 0; --i) {
          const int t = first + i;
          const FloatVector sum = vector_at(spare.sums[i] + column);
          put(d_x[t] + column, fma(vector_at(spare.from[i] + column), sum, vector_at(d_x[t] + column)));
          if (EXCLUSIVE) put(d_decay[t] + column, vector_at(d_decay[t] + column) + after);
          after = fma(vector_at(spare.rows[i] + column), sum, after);
          if (!EXCLUSIVE) put(d_decay[t] + column, vector_at(d_decay[t] + column) + after);
        }
      }
      product<Set::TO, Depth::ALL>(spare.sums, first, BLOCK, d_matrix[0] + first, C, 1, spare.rows);
      for (int column = 0; column < dims; column += WIDTH) {
        FloatVector earlier{};
        for (int j = 0; j < first; ++j) {
          const FloatVector sum = vector_at(spare.sums[j] + column);
          put(d_y[j] + column, fma(vector_at(spare.factor[j] + column), sum, vector_at(d_y[j] + column)));
          put(d_decay[j] + column, vector_at(d_decay[j] + column) + earlier);
          earlier = fma(vector_at(spare.before[j] + column), sum, earlier);
        }
      }
    }
    move_border(spare, y, steps, first);
  }
}

/// d_decay_t = whole * the row sums of state * d_state + the sum of keys_j * d_keys_j over j < t.
template <int N, int V>
OUTLINE void carried_gradient(Real (*d_decay)[N], const Real (*keys)[N], const Real (*d_keys)[N], const Real (*state)[V],
                              const Real (*d_state)[V], int dims, const Real* whole, int rows) {
  alignas(64) Real total[N] = {};
  row_products(total, state, d_state, dims);
  for (int column = 0; column < N; column += WIDTH) {
    FloatVector sum = vector_at(total + column) * vector_at(whole + column);
    for (int t = 0; t < rows; ++t) {
      put(d_decay[t] + column, sum);
      sum = fma(vector_at(keys[t] + column), vector_at(d_keys[t] + column), sum);
    }
  }
}
template <bool EXCLUSIVE, int N>
OUTLINE void add_reads(Real (*d_decay)[N], const Real (*x)[N], const Real (*d_x)[N], int rows) {
  for (int column = 0; column < N; column += WIDTH) {
    FloatVector total{};
    for (int t = rows - 1; t >= 0; --t) {
      if (EXCLUSIVE) put(d_decay[t] + column, vector_at(d_decay[t] + column) + total);
      total = fma(vector_at(x[t] + column), vector_at(d_x[t] + column), total);
      if (!EXCLUSIVE) put(d_decay[t] + column, vector_at(d_decay[t] + column) + total);
    }
  }
}

}  // namespace attention
