// gated delta net: backward | cpu | golden
#define LANE_REGISTERS 4
#include "kernel.h"
#include "chunk_vectors.h"

namespace attention {

constexpr int CHUNK = 32, SEGMENT = 16, D = 64, DV = 64, STATE_COLUMNS = 64;
constexpr int T_COLUMNS = round_up(CHUNK, WIDTH), D_COLUMNS = round_up(D, LANES), V_COLUMNS = round_up(STATE_COLUMNS, LANES);

struct Arguments {  // 8 bytes each: the launcher fills them in this order
  int64_t next_task;  // shared by the threads
  Tensor<const float, 4> Q;
  Tensor<const float, 4> K;
  Tensor<const float, 4> V;
  Tensor<const float, 3> decay_given;
  Tensor<const float, 3> beta_given;
  Tensor<const float, 2> A_log;
  Tensor<const float, 2> dt_bias;
  Tensor<const float, 4> dO;
  Tensor<const float, 4> d_final;
  Tensor<const float, 4> kept;
  Tensor<float, 4> d_initial;
  Tensor<float, 4> d_q;
  Tensor<float, 4> d_k;
  Tensor<float, 4> d_v;
  Tensor<float, 3> d_beta;
  Tensor<float, 3> d_decay;
  Tensor<double, 2> d_A_log_0;
  Tensor<double, 2> d_dt_bias_1;
  Tensor<const int64_t, 2> sequences;
  Tensor<int64_t, 2> faults;
  int64_t sequence_count, heads, q_heads, k_heads, keep_states, position;
  double largest;
};

struct Scratch {  // of one thread
  alignas(64) Real decays[T_COLUMNS];
  alignas(64) Real keys[CHUNK][D_COLUMNS];
  alignas(64) Real values[CHUNK][V_COLUMNS];
  alignas(64) Real erasers[CHUNK][D_COLUMNS];
  alignas(64) RunningSum<T_COLUMNS> decay_sums;
  alignas(64) Real decay_between[CHUNK][T_COLUMNS];
  alignas(64) Real decay_erases[T_COLUMNS];
  alignas(64) Real decay_writes[T_COLUMNS];
  alignas(64) Real decay_whole;
  alignas(64) Real erasers_decayed[CHUNK][D_COLUMNS];
  alignas(64) Real erased[CHUNK][T_COLUMNS];
  alignas(64) Real state[D_COLUMNS][V_COLUMNS];
  alignas(64) Real keys_decayed[CHUNK][D_COLUMNS];
  alignas(64) Real queries[CHUNK][D_COLUMNS];
  alignas(64) Real weights[CHUNK][T_COLUMNS];
  alignas(64) Real d_out[CHUNK][V_COLUMNS];
  alignas(64) Real queries_decayed[CHUNK][D_COLUMNS];
  alignas(64) Real d_values[CHUNK][V_COLUMNS];
  alignas(64) Real d_state[D_COLUMNS][V_COLUMNS];
  alignas(64) Real d_queries[CHUNK][D_COLUMNS];
  alignas(64) Real d_keys[CHUNK][D_COLUMNS];
  alignas(64) Real d_weights[CHUNK][T_COLUMNS];
  alignas(64) Real d_erasers[CHUNK][D_COLUMNS];
  alignas(64) Real d_decays[T_COLUMNS];
  alignas(64) Real d_erased[CHUNK][T_COLUMNS];
  alignas(64) Real spare_rows[D_COLUMNS > V_COLUMNS ? D_COLUMNS : V_COLUMNS][T_COLUMNS];
  alignas(64) Real spare_state[V_COLUMNS][D_COLUMNS];
  alignas(64) Real states[SEGMENT][D_COLUMNS][V_COLUMNS];
  alignas(64) Real d_A_log_0_sum[1];
  alignas(64) Real d_dt_bias_1_sum[1];
};

static void gradient_task(const Arguments& arguments, Scratch& scratch, int sequence, int head) {
  const auto& Q = arguments.Q;
  const auto& K = arguments.K;
  const auto& V = arguments.V;
  const auto& decay_given = arguments.decay_given;
  const auto& beta_given = arguments.beta_given;
  const auto& A_log = arguments.A_log;
  const auto& dt_bias = arguments.dt_bias;
  const auto& dO = arguments.dO;
  const auto& d_final = arguments.d_final;
  const auto& kept = arguments.kept;
  const auto& d_initial = arguments.d_initial;
  const auto& d_q = arguments.d_q;
  const auto& d_k = arguments.d_k;
  const auto& d_v = arguments.d_v;
  const auto& d_beta = arguments.d_beta;
  const auto& d_decay = arguments.d_decay;
  const auto& d_A_log_0 = arguments.d_A_log_0;
  const auto& d_dt_bias_1 = arguments.d_dt_bias_1;
  const auto& faults = arguments.faults;
  const Real largest = arguments.largest;
  auto& decays = scratch.decays;
  auto& keys = scratch.keys;
  auto& values = scratch.values;
  auto& erasers = scratch.erasers;
  auto& decay_sums = scratch.decay_sums;
  auto& decay_between = scratch.decay_between;
  auto& decay_erases = scratch.decay_erases;
  auto& decay_writes = scratch.decay_writes;
  auto& decay_whole = scratch.decay_whole;
  auto& erasers_decayed = scratch.erasers_decayed;
  auto& erased = scratch.erased;
  auto& state = scratch.state;
  auto& keys_decayed = scratch.keys_decayed;
  auto& queries = scratch.queries;
  auto& weights = scratch.weights;
  auto& d_out = scratch.d_out;
  auto& queries_decayed = scratch.queries_decayed;
  auto& d_values = scratch.d_values;
  auto& d_state = scratch.d_state;
  auto& d_queries = scratch.d_queries;
  auto& d_keys = scratch.d_keys;
  auto& d_weights = scratch.d_weights;
  auto& d_erasers = scratch.d_erasers;
  auto& d_decays = scratch.d_decays;
  auto& d_erased = scratch.d_erased;
  auto& spare_rows = scratch.spare_rows;
  auto& spare_state = scratch.spare_state;
  auto& states = scratch.states;
  auto& d_A_log_0_sum = scratch.d_A_log_0_sum;
  auto& d_dt_bias_1_sum = scratch.d_dt_bias_1_sum;
  const int64_t *about = &arguments.sequences.data[sequence * arguments.sequences.strides[0]];
  const int batch = about[0], first = about[1], length = about[2];
  const auto Q_rows = matrix(arguments.Q, batch, floor_div(head, arguments.heads / arguments.q_heads));
  const auto K_rows = matrix(arguments.K, batch, floor_div(head, arguments.heads / arguments.k_heads));
  const auto V_rows = matrix(arguments.V, batch, head);
  const auto dO_rows = matrix(arguments.dO, batch, head);
  const auto d_q_rows = matrix(arguments.d_q, batch, head);
  const auto d_k_rows = matrix(arguments.d_k, batch, head);
  const auto d_v_rows = matrix(arguments.d_v, batch, head);
  const auto scan = [&](int chunk_start) __attribute__((noinline)) {
    const int count = min(CHUNK, length - chunk_start), rows = round_up(count, 16);

    // -- the chunk's rows
    for (int row = 0; row < count; ++row) {
      const int token = first + chunk_start + row;
      prefetch_row<D>(K_rows, token + TOKENS_AHEAD);
      prefetch_row<DV>(V_rows, token + TOKENS_AHEAD);
      const Real decay = decay_given(batch, head, token);
      const Real beta = beta_given(batch, head, token);
      const auto x_1 = decay + dt_bias(0, head);
      const auto x_2 = x_1 * 1.0f;
      Floats x_3_lanes = fill(Real(0));
      for (int column = 0; column < D; column += LANES) {
        const Floats key = row_lanes<D>(K_rows, token, column);
        x_3_lanes = x_3_lanes + key * key;
      }
      const Real x_3 = total_of(x_3_lanes);
      const auto x_4 = rsqrt(x_3 + 1e-06f);
      // delta_net.py:23: return largest * torch.sigmoid(beta)
      const auto x_5 = largest * sigmoid(beta);
      decays[row] = -exp(A_log(0, head)) * where(20.0f < x_2, x_1, log(1.0f + exp(min(x_2, 20.0f))) / 1.0f);
      for (int column = 0; column < D; column += LANES) {
        const Floats key = row_lanes<D>(K_rows, token, column);
        const auto x_6 = key * x_4;
        store(keys[row] + column, x_6 * x_5);
        store(erasers[row] + column, x_6);
      }
      for (int column = 0; column < DV; column += LANES) {
        const Floats value = row_lanes<DV>(V_rows, token, column);
        store(values[row] + column, value);
      }
    }
    for (int row = count; row < T_COLUMNS; ++row) decays[row] = 0;
    clear_rows(keys, count, rows);
    clear_rows(values, count, rows);
    clear_rows(erasers, count, rows);
    if (const int64_t fault = fault_in(decays, count))
      if (!arguments.faults.data[(int64_t)sequence * arguments.heads + head]) arguments.faults.data[(int64_t)sequence * arguments.heads + head] = fault + 2 * chunk_start;

    // -- what is left of a step by another: never more than 1
    sum_decays(decays, rows, decay_sums, decay_writes, decay_whole);
    read_factors<false>(decay_erases, decay_sums);
    decay_matrix<false>(decay_between, decay_sums, rows);

    // -- values without what the state already holds
    gram<true, false>(erased, erasers, keys, spare_rows, rows, D, TokenDecay<T_COLUMNS>{decay_between});
    product<Set::SUBTRACT, Depth::ALL>(values, rows, D, erasers[0], D_COLUMNS, 1, state, RowFactor{decay_erases});
    solve_lower(values, erased, rows);

    // -- the state after the chunk
    scale_rows(keys_decayed, keys, decay_writes, rows);
    state_step<false>(state, D, keys_decayed, values, rows, [&](int) { return decay_whole; });
  };
  const auto gradient = [&](int chunk_start) __attribute__((noinline)) {
    const int count = min(CHUNK, length - chunk_start), rows = round_up(count, 16);
    __builtin_memset(d_A_log_0_sum, 0, sizeof d_A_log_0_sum);
    __builtin_memset(d_dt_bias_1_sum, 0, sizeof d_dt_bias_1_sum);

    // -- the chunk's rows
    for (int row = 0; row < count; ++row) {
      const int token = first + chunk_start + row;
      prefetch_row<D>(Q_rows, token + TOKENS_AHEAD);
      prefetch_row<D>(K_rows, token + TOKENS_AHEAD);
      prefetch_row<DV>(V_rows, token + TOKENS_AHEAD);
      const Real decay = decay_given(batch, head, token);
      const Real beta = beta_given(batch, head, token);
      Floats x_7_lanes = fill(Real(0));
      for (int column = 0; column < D; column += LANES) {
        const Floats query = row_lanes<D>(Q_rows, token, column);
        x_7_lanes = x_7_lanes + query * query;
      }
      const Real x_7 = total_of(x_7_lanes);
      const auto x_8 = rsqrt(x_7 + 1e-06f);
      const auto x_9 = decay + dt_bias(0, head);
      const auto x_10 = x_9 * 1.0f;
      Floats x_11_lanes = fill(Real(0));
      for (int column = 0; column < D; column += LANES) {
        const Floats key = row_lanes<D>(K_rows, token, column);
        x_11_lanes = x_11_lanes + key * key;
      }
      const Real x_11 = total_of(x_11_lanes);
      const auto x_12 = rsqrt(x_11 + 1e-06f);
      // delta_net.py:23: return largest * torch.sigmoid(beta)
      const auto x_13 = largest * sigmoid(beta);
      decays[row] = -exp(A_log(0, head)) * where(20.0f < x_10, x_9, log(1.0f + exp(min(x_10, 20.0f))) / 1.0f);
      for (int column = 0; column < D; column += LANES) {
        const Floats query = row_lanes<D>(Q_rows, token, column);
        const Floats key = row_lanes<D>(K_rows, token, column);
        const auto x_14 = key * x_12;
        store(queries[row] + column, query * x_8 * 0.125f);
        store(keys[row] + column, x_14 * x_13);
        store(erasers[row] + column, x_14);
      }
      for (int column = 0; column < DV; column += LANES) {
        const Floats value = row_lanes<DV>(V_rows, token, column);
        store(values[row] + column, value);
      }
    }
    clear_rows(queries, count, rows);
    for (int row = count; row < T_COLUMNS; ++row) decays[row] = 0;
    clear_rows(keys, count, rows);
    clear_rows(values, count, rows);
    clear_rows(erasers, count, rows);
    if (const int64_t fault = fault_in(decays, count))
      if (!arguments.faults.data[(int64_t)sequence * arguments.heads + head]) arguments.faults.data[(int64_t)sequence * arguments.heads + head] = fault + 2 * chunk_start;

    // -- what is left of a step by another: never more than 1
    sum_decays(decays, rows, decay_sums, decay_writes, decay_whole);
    read_factors<false>(decay_erases, decay_sums);
    decay_matrix<false>(decay_between, decay_sums, rows);

    // -- values without what the state already holds
    scale_rows(erasers_decayed, erasers, decay_erases, rows);
    gram<true, false>(erased, erasers, keys, spare_rows, rows, D, TokenDecay<T_COLUMNS>{decay_between});
    product<Set::SUBTRACT, Depth::ALL>(values, rows, D, erasers_decayed[0], D_COLUMNS, 1, state);
    solve_lower(values, erased, rows);

    // -- what the tokens read of each other
    gram<false, false>(weights, queries, keys, spare_rows, rows, D, TokenDecay<T_COLUMNS>{decay_between});

    // -- the gradient of the output
    for (int row = 0; row < count; ++row) {
      const int token = first + chunk_start + row;
      prefetch_row<DV>(dO_rows, token + TOKENS_AHEAD);
      for (int column = 0; column < DV; column += LANES) {
        const Floats d_output = row_lanes<DV>(dO_rows, token, column);
        store(d_out[row] + column, d_output);
      }
    }
    clear_rows(d_out, count, rows);

    // -- what the values, and the state across chunks, have done
    scale_rows(queries_decayed, queries, decay_erases, rows);
    product<Set::TO, Depth::FROM_ROW>(d_values, rows, rows, weights[0], T_COLUMNS, 1, d_out);
    product<Set::ADD, Depth::ALL>(d_values, rows, D, keys[0], D_COLUMNS, 1, d_state, RowFactor{decay_writes});
    transpose_rows(spare_state, state, D_COLUMNS, STATE_COLUMNS);
    product<Set::TO, Depth::ALL>(d_queries, rows, STATE_COLUMNS, d_out[0], V_COLUMNS, 1, spare_state, RowFactor{decay_erases});
    transpose_rows(spare_state, d_state, D_COLUMNS, STATE_COLUMNS);
    product<Set::TO, Depth::ALL>(d_keys, rows, STATE_COLUMNS, values[0], V_COLUMNS, 1, spare_state, RowFactor{decay_writes});

    // -- the weights inside the chunk
    gram<false, false>(d_weights, d_out, values, spare_rows, rows, STATE_COLUMNS, NoDecay{});

    // -- the corrected values
    solve_upper(d_values, erased, rows);
    transpose_rows(spare_state, state, D_COLUMNS, STATE_COLUMNS);
    product<Set::NEGATIVE, Depth::ALL>(d_erasers, rows, STATE_COLUMNS, d_values[0], V_COLUMNS, 1, spare_state, RowFactor{decay_erases});

    // -- the decay: every pair of tokens, and of token and state, that it lies between
    carried_gradient(d_decays, keys, d_keys, state, d_state, D, decay_whole, rows);
    add_reads<false>(d_decays, queries, d_queries, rows);
    add_reads<false>(d_decays, erasers, d_erasers, rows);
    gram_gradient<false, false>(d_weights, weights, queries, keys, d_queries, d_keys, rows, TokenDecay<T_COLUMNS>{decay_between}, d_decays);
    state_step<false>(d_state, D, queries_decayed, d_out, rows, [&](int) { return decay_whole; });

    // -- the weights of the correction
    gram<true, true>(d_erased, d_values, values, spare_rows, rows, STATE_COLUMNS, NoDecay{});
    gram_gradient<true, false>(d_erased, erased, erasers, keys, d_erasers, d_keys, rows, TokenDecay<T_COLUMNS>{decay_between}, d_decays);
    state_step<true>(d_state, D, erasers_decayed, d_values, rows, [](int) { return Real(1); });

    // -- back through the mods
    for (int row = 0; row < count; ++row) {
      const int token = first + chunk_start + row;
      prefetch_row<D>(Q_rows, token + TOKENS_AHEAD);
      prefetch_row<D>(K_rows, token + TOKENS_AHEAD);
      prefetch_row<D>(d_q_rows, token + TOKENS_AHEAD);
      prefetch_row<D>(d_k_rows, token + TOKENS_AHEAD);
      prefetch_row<DV>(d_v_rows, token + TOKENS_AHEAD);
      const Real beta = beta_given(batch, head, token);
      const Real decay = decay_given(batch, head, token);
      const Real d_decays_row = d_decays[row];
      Floats x_15_lanes = fill(Real(0));
      for (int column = 0; column < D; column += LANES) {
        const Floats query = row_lanes<D>(Q_rows, token, column);
        x_15_lanes = x_15_lanes + query * query;
      }
      const Real x_15 = total_of(x_15_lanes);
      const auto x_16 = x_15 + 1e-06f;
      const auto x_17 = rsqrt(x_16);
      Floats x_18_lanes = fill(Real(0));
      for (int column = 0; column < D; column += LANES) {
        const Floats d_queries_row = load(d_queries[row] + column);
        const Floats query = row_lanes<D>(Q_rows, token, column);
        x_18_lanes = x_18_lanes + d_queries_row * 0.125f * query;
      }
      const Real x_18 = total_of(x_18_lanes);
      const auto x_19 = x_18 * -0.5f * x_17 / x_16;
      const auto x_20 = sigmoid(beta);
      // delta_net.py:23: return largest * torch.sigmoid(beta)
      const auto x_21 = largest * x_20;
      Floats x_22_lanes = fill(Real(0));
      for (int column = 0; column < D; column += LANES) {
        const Floats key = row_lanes<D>(K_rows, token, column);
        x_22_lanes = x_22_lanes + key * key;
      }
      const Real x_22 = total_of(x_22_lanes);
      const auto x_23 = x_22 + 1e-06f;
      const auto x_24 = rsqrt(x_23);
      Floats x_25_lanes = fill(Real(0));
      for (int column = 0; column < D; column += LANES) {
        const Floats d_erasers_row = load(d_erasers[row] + column);
        const Floats d_keys_row = load(d_keys[row] + column);
        const Floats key = row_lanes<D>(K_rows, token, column);
        x_25_lanes = x_25_lanes + (d_erasers_row + d_keys_row * x_21) * key;
      }
      const Real x_25 = total_of(x_25_lanes);
      const auto x_26 = x_25 * -0.5f * x_24 / x_23;
      Floats x_27_lanes = fill(Real(0));
      for (int column = 0; column < D; column += LANES) {
        const Floats d_keys_row = load(d_keys[row] + column);
        const Floats key = row_lanes<D>(K_rows, token, column);
        x_27_lanes = x_27_lanes + d_keys_row * (key * x_24);
      }
      const Real x_27 = total_of(x_27_lanes);
      const auto x_28 = decay + dt_bias(0, head);
      const auto x_29 = 20.0f < x_28;
      const auto x_30 = exp(A_log(0, head));
      const auto x_31 = d_decays_row * -x_30;
      const auto x_32 = exp(min(x_28, 20.0f));
      const auto x_33 = 1.0f + x_32;
      const auto x_34 = where(x_29, 0.0f, x_31) / x_33 * x_32;
      write(d_beta, 1, Real(x_27 * largest * (x_20 * (1.0f - x_20))), batch, head, token);
      write(d_decay, 1, Real(where(x_29, x_31, 0.0f) + where(x_28 == 20.0f, x_34 * 0.5f, where(x_28 < 20.0f, x_34, 0.0f))), batch, head, token);
      d_A_log_0_sum[0] += -(d_decays_row * where(x_29, x_28, log(x_33))) * x_30;
      d_dt_bias_1_sum[0] += where(x_29, x_31, 0.0f) + where(x_28 == 20.0f, x_34 * 0.5f, where(x_28 < 20.0f, x_34, 0.0f));
      for (int column = 0; column < D; column += LANES) {
        const Floats d_queries_row = load(d_queries[row] + column);
        const Floats query = row_lanes<D>(Q_rows, token, column);
        const auto x_35 = x_19 * query;
        const Floats d_erasers_row = load(d_erasers[row] + column);
        const Floats d_keys_row = load(d_keys[row] + column);
        const Floats key = row_lanes<D>(K_rows, token, column);
        const auto x_36 = x_26 * key;
        write_row<D>(d_q_rows, token, column, d_queries_row * 0.125f * x_17 + x_35 + x_35);
        write_row<D>(d_k_rows, token, column, (d_erasers_row + d_keys_row * x_21) * x_24 + x_36 + x_36);
      }
      for (int column = 0; column < DV; column += LANES) {
        const Floats d_values_row = load(d_values[row] + column);
        write_row<DV>(d_v_rows, token, column, d_values_row);
      }
    }
    add_total<1>(d_A_log_0.data + sequence * d_A_log_0.strides[0] + head * d_A_log_0.strides[1], d_A_log_0_sum);
    add_total<1>(d_dt_bias_1.data + sequence * d_dt_bias_1.strides[0] + head * d_dt_bias_1.strides[1], d_dt_bias_1_sum);
  };

  // -- all segments from the last to the first: their states again, then their chunks backwards
  clear_rows(state, 0, D_COLUMNS);
  clear_rows(d_state, 0, D_COLUMNS);
  const auto d_final_rows = matrix(d_final, sequence, head);
  for (int row = 0; row < D; ++row) read_row(d_state[row], d_final_rows, row, STATE_COLUMNS);
  const int chunks = (length + CHUNK - 1) / CHUNK;
  for (int segment = (chunks - 1) / SEGMENT; segment >= 0 && chunks; --segment) {
    const int begin = segment * SEGMENT, end = min(begin + SEGMENT, chunks);
    const auto kept_rows = matrix(kept, about[3] + segment, head);
    for (int row = 0; row < D; ++row) read_row(state[row], kept_rows, row, STATE_COLUMNS);
    for (int chunk = begin; chunk < end; ++chunk) {
      __builtin_memcpy(states[chunk - begin], state, sizeof state);
      if (chunk + 1 < end) scan(chunk * CHUNK);
    }
    for (int chunk = end - 1; chunk >= begin; --chunk) {
      __builtin_memcpy(state, states[chunk - begin], sizeof state);
      gradient(chunk * CHUNK);
    }
  }
  const auto d_initial_rows = matrix(d_initial, sequence, head);
  for (int row = 0; row < D; ++row)
    for (int column = 0; column < STATE_COLUMNS; column += LANES)
      write_row<STATE_COLUMNS>(d_initial_rows, row, column, load(d_state[row] + column));
}

// Any number of threads may run this on the same arguments; each takes the next task.
extern "C" void attn_engine_linear_backward(Arguments* arguments) {
  const int64_t tasks = arguments->sequence_count * arguments->heads;
  Scratch* scratch = (Scratch*)aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&arguments->next_task, 1, __ATOMIC_RELAXED);
    if (task >= tasks) break;
    gradient_task(*arguments, *scratch, task / arguments->heads, task % arguments->heads);
  }
  free(scratch);
}

}  // namespace attention
