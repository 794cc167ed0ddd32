// gated delta net: forward | cpu | golden
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
  Tensor<const float, 4> initial;
  Tensor<float, 4> kept;
  Tensor<float, 4> final;
  Tensor<float, 4> O;
  Tensor<const int64_t, 2> sequences;
  Tensor<int64_t, 2> faults;
  int64_t sequence_count, heads, q_heads, k_heads, keep_states, position;
  double largest;
};

struct Scratch {  // of one thread
  alignas(64) Real decays[T_COLUMNS];
  alignas(64) Real queries[CHUNK][D_COLUMNS];
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
  alignas(64) Real weights[CHUNK][T_COLUMNS];
  alignas(64) Real queries_decayed[CHUNK][D_COLUMNS];
  alignas(64) Real out[CHUNK][V_COLUMNS];
  alignas(64) Real keys_decayed[CHUNK][D_COLUMNS];
  alignas(64) Real spare_rows[D_COLUMNS > V_COLUMNS ? D_COLUMNS : V_COLUMNS][T_COLUMNS];
};

static void attention_task(const Arguments& arguments, Scratch& scratch, int sequence, int head) {
  const auto& Q = arguments.Q;
  const auto& K = arguments.K;
  const auto& V = arguments.V;
  const auto& decay_given = arguments.decay_given;
  const auto& beta_given = arguments.beta_given;
  const auto& A_log = arguments.A_log;
  const auto& dt_bias = arguments.dt_bias;
  const auto& initial = arguments.initial;
  const auto& kept = arguments.kept;
  const auto& final = arguments.final;
  const auto& O = arguments.O;
  const auto& faults = arguments.faults;
  const Real largest = arguments.largest;
  auto& decays = scratch.decays;
  auto& queries = scratch.queries;
  auto& keys = scratch.keys;
  auto& values = scratch.values;
  auto& erasers = scratch.erasers;
  auto& decay_sums = scratch.decay_sums;
  auto& decay_between = scratch.decay_between;
  auto& decay_erases = scratch.decay_erases;
  auto& decay_writes = scratch.decay_writes;
  auto& decay_whole = scratch.decay_whole;
  auto& erased = scratch.erased;
  auto& state = scratch.state;
  auto& weights = scratch.weights;
  auto& out = scratch.out;
  auto& keys_decayed = scratch.keys_decayed;
  auto& spare_rows = scratch.spare_rows;
  const int64_t *about = &arguments.sequences.data[sequence * arguments.sequences.strides[0]];
  const int batch = about[0], first = about[1], length = about[2];
  const auto Q_rows = matrix(arguments.Q, batch, floor_div(head, arguments.heads / arguments.q_heads));
  const auto K_rows = matrix(arguments.K, batch, floor_div(head, arguments.heads / arguments.k_heads));
  const auto V_rows = matrix(arguments.V, batch, head);
  const auto O_rows = matrix(arguments.O, batch, head);
  const auto scan = [&](int chunk_start) __attribute__((noinline)) {
    const int count = min(CHUNK, length - chunk_start), rows = round_up(count, 16);

    // -- the chunk's rows
    for (int row = 0; row < count; ++row) {
      const int token = first + chunk_start + row;
      prefetch_row<D>(Q_rows, token + TOKENS_AHEAD);
      prefetch_row<D>(K_rows, token + TOKENS_AHEAD);
      prefetch_row<DV>(V_rows, token + TOKENS_AHEAD);
      const Real decay = decay_given(batch, head, token);
      const Real beta = beta_given(batch, head, token);
      Floats x_1_lanes = fill(Real(0));
      for (int column = 0; column < D; column += LANES) {
        const Floats query = row_lanes<D>(Q_rows, token, column);
        x_1_lanes = x_1_lanes + query * query;
      }
      const Real x_1 = total_of(x_1_lanes);
      const auto x_2 = rsqrt(x_1 + 1e-06f);
      const auto x_3 = decay + dt_bias(0, head);
      const auto x_4 = x_3 * 1.0f;
      Floats x_5_lanes = fill(Real(0));
      for (int column = 0; column < D; column += LANES) {
        const Floats key = row_lanes<D>(K_rows, token, column);
        x_5_lanes = x_5_lanes + key * key;
      }
      const Real x_5 = total_of(x_5_lanes);
      const auto x_6 = rsqrt(x_5 + 1e-06f);
      // delta_net.py:23: return largest * torch.sigmoid(beta)
      const auto x_7 = largest * sigmoid(beta);
      decays[row] = -exp(A_log(0, head)) * where(20.0f < x_4, x_3, log(1.0f + exp(min(x_4, 20.0f))) / 1.0f);
      for (int column = 0; column < D; column += LANES) {
        const Floats query = row_lanes<D>(Q_rows, token, column);
        const Floats key = row_lanes<D>(K_rows, token, column);
        const auto x_8 = key * x_6;
        store(queries[row] + column, query * x_2 * 0.125f);
        store(keys[row] + column, x_8 * x_7);
        store(erasers[row] + column, x_8);
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
    gram<true, false>(erased, erasers, keys, spare_rows, rows, D, TokenDecay<T_COLUMNS>{decay_between});
    product<Set::SUBTRACT, Depth::ALL>(values, rows, D, erasers[0], D_COLUMNS, 1, state, RowFactor{decay_erases});
    solve_lower(values, erased, rows);

    // -- what the tokens read of each other
    gram<false, false>(weights, queries, keys, spare_rows, rows, D, TokenDecay<T_COLUMNS>{decay_between});
    product<Set::TO, Depth::ALL>(out, rows, D, queries[0], D_COLUMNS, 1, state, RowFactor{decay_erases});
    product<Set::ADD, Depth::UP_TO_ROW>(out, rows, rows, weights[0], 1, T_COLUMNS, values);
    for (int row = 0; row < count; ++row) {
      const int token = first + chunk_start + row;
      prefetch_row<DV>(O_rows, token + TOKENS_AHEAD);
      for (int column = 0; column < DV; column += LANES) {
        const Floats out_row = load(out[row] + column);
        write_row<DV>(O_rows, token, column, out_row);
      }
    }

    // -- the state after the chunk
    scale_rows(keys_decayed, keys, decay_writes, rows);
    state_step<false>(state, D, keys_decayed, values, rows, [&](int) { return decay_whole; });
  };

  // -- all chunks; the state is kept at the start of each segment, for the backward pass
  clear_rows(state, 0, D_COLUMNS);
  const auto initial_rows = matrix(initial, sequence, head);
  for (int row = 0; row < D; ++row) read_row(state[row], initial_rows, row, STATE_COLUMNS);
  for (int chunk_start = 0; chunk_start < length; chunk_start += CHUNK) {
    const int chunk = chunk_start / CHUNK;
    if (arguments.keep_states && chunk % SEGMENT == 0) {
      const auto kept_rows = matrix(kept, about[3] + chunk / SEGMENT, head);
      for (int row = 0; row < D; ++row)
        for (int column = 0; column < STATE_COLUMNS; column += LANES)
          write_row<STATE_COLUMNS>(kept_rows, row, column, load(state[row] + column));
    }
    scan(chunk_start);
  }
  const auto final_rows = matrix(final, sequence, head);
  for (int row = 0; row < D; ++row)
    for (int column = 0; column < STATE_COLUMNS; column += LANES)
      write_row<STATE_COLUMNS>(final_rows, row, column, load(state[row] + column));
}

// Any number of threads may run this on the same arguments; each takes the next task.
extern "C" void attn_engine_linear_forward(Arguments* arguments) {
  const int64_t tasks = arguments->sequence_count * arguments->heads;
  Scratch* scratch = (Scratch*)aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&arguments->next_task, 1, __ATOMIC_RELAXED);
    if (task >= tasks) break;
    attention_task(*arguments, *scratch, task / arguments->heads, task % arguments->heads);
  }
  free(scratch);
}

}  // namespace attention
