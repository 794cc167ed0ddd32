// attn_engine golden | score_mod_mask_mod_OnlineSoftmax: backward | cpu | block_q=64 block_kv=64
// regenerate: engine.source(backend="cpu", kernel="backward")
#define LANE_REGISTERS 4
#include "kernel.h"

namespace attention {

constexpr int BLOCK_Q = 64, BLOCK_KV = 64, D = 64, DV = 64;
static_assert(BLOCK_KV == LANES, "one key per lane");

struct Arguments {  // 8 bytes each: the launcher fills them in this order
  int64_t next_task;  // shared by the threads
  Tensor<const float, 4> Q;
  Tensor<const float, 4> K;
  Tensor<const float, 4> V;
  Tensor<const float, 4> dO;
  Tensor<const float, 3> saved_row_max;
  Tensor<const float, 3> saved_inverse_sum;
  Tensor<const float, 3> Delta;
  Tensor<const float, 1> slopes;
  Tensor<float, 4> dK;
  Tensor<float, 4> dV;
  Tensor<float, 3> d_slopes_columns;
  Tensor<float, 5> dQ_parts;
  int64_t batches, heads, kv_heads, q_len, kv_len;
  double scale;
  double cap;
  int64_t window;
  int64_t splits;
};
static_assert(sizeof(Arguments) == 8 * 106);

struct Scratch {  // of one thread
  alignas(64) Real d_value_tile[round_up(DV, ROWS)][LANES];
  alignas(64) Real d_key_tile[round_up(D, ROWS)][LANES];
  alignas(64) Real key_packed[D][LANES];
  alignas(64) Real key_spare[BLOCK_KV][round_up(D, LANES)];
  alignas(64) Real value_packed[DV][LANES];
  alignas(64) Real safe_row_max_tile[BLOCK_Q];
  alignas(64) Real inverse_sum_tile[BLOCK_Q];
  alignas(64) Real delta_tile[BLOCK_Q];
  alignas(64) Real query_spare[BLOCK_Q][round_up(D, ROWS)];
  alignas(64) Real d_out_spare[BLOCK_Q][round_up(DV, ROWS)];
  alignas(64) Real d_probs_tile[BLOCK_Q][LANES];
  alignas(64) Real probs_tile[BLOCK_Q][LANES];
  alignas(64) Real d_score_tile[BLOCK_Q][LANES];
  alignas(64) Real result_tile[round_up(D, ROWS)][LANES];
};

static void tile_task(const Arguments& arguments, Scratch& scratch, int split, int kv_head, int batch) {
  const auto& Q = arguments.Q;
  const auto& K = arguments.K;
  const auto& V = arguments.V;
  const auto& dO = arguments.dO;
  const auto& saved_row_max = arguments.saved_row_max;
  const auto& saved_inverse_sum = arguments.saved_inverse_sum;
  const auto& Delta = arguments.Delta;
  const auto& slopes = arguments.slopes;
  const auto& dK = arguments.dK;
  const auto& dV = arguments.dV;
  const auto& d_slopes_columns = arguments.d_slopes_columns;
  const auto& dQ_parts = arguments.dQ_parts;
  const int heads = arguments.heads, kv_heads = arguments.kv_heads, q_len = arguments.q_len, kv_len = arguments.kv_len;
  const Real scale = arguments.scale;
  const Real cap = arguments.cap;
  const int window = arguments.window;
  const int splits = arguments.splits;
  auto& d_value_tile = scratch.d_value_tile;
  auto& d_key_tile = scratch.d_key_tile;
  auto& key_packed = scratch.key_packed;
  auto& key_spare = scratch.key_spare;
  auto& value_packed = scratch.value_packed;
  auto& safe_row_max_tile = scratch.safe_row_max_tile;
  auto& inverse_sum_tile = scratch.inverse_sum_tile;
  auto& delta_tile = scratch.delta_tile;
  auto& query_spare = scratch.query_spare;
  auto& d_out_spare = scratch.d_out_spare;
  auto& d_probs_tile = scratch.d_probs_tile;
  auto& probs_tile = scratch.probs_tile;
  auto& d_score_tile = scratch.d_score_tile;
  auto& result_tile = scratch.result_tile;

  // -- kv tiles of this split
  const int kv_tiles = floor_div(kv_len + 63, 64);
  const int tiles_per_split = floor_div(kv_tiles + splits - 1, splits);
  const int split_begin = split * tiles_per_split * 64;
  const int split_end = min(split_begin + tiles_per_split * 64, kv_tiles * 64);
  for (int kv_start = split_begin; kv_start < split_end; kv_start += BLOCK_KV) {
    const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
    const Positions kv_idx = positions(kv_start);

    // -- kv tile of this program
    for (int row = 0; row < DV; ++row) store(d_value_tile[row], fill(0.0f));
    for (int row = 0; row < D; ++row) store(d_key_tile[row], fill(0.0f));
    pack_lanes<D>(key_packed, matrix(K, batch, kv_head), kv_start, kv_rows, scale);
    const Rows key = tile_of<D>(matrix(K, batch, kv_head), kv_start, kv_rows, key_spare);
    pack_lanes<DV>(value_packed, matrix(V, batch, kv_head), kv_start, kv_rows, 1.0f);

    // -- query heads that read this kv head
    const int group = floor_div(heads, kv_heads);
    const int first_head = kv_head * group;
    for (int head = first_head; head < first_head + group; ++head) {
      const Real slopes_value = slopes(head);
      Floats d_slopes_columns_sum = fill(0.0f);
      const int kv_last = min(kv_start + 63, kv_len - 1);
      const int q_begin = max(floor_div(kv_start, 64) * 64, 0);
      const int q_end = max(floor_div(min(kv_last + (window - 1) + 1, q_len) + 63, 64) * 64, q_begin);
      const int q_full_begin = min(max(floor_div(kv_last + 63, 64) * 64, q_begin), q_end);
      const int q_full_end = max(min(floor_div(where(kv_start + 64 <= kv_len, min(kv_start + (window - 1) + 1, q_len), 0), 64) * 64, q_end), q_full_begin);

      // -- q tiles seen in part: left edge
      const auto partial_step = [&](int q_start) __attribute__((noinline)) {
        const int q_rows = min(BLOCK_Q, q_len - q_start);
        for (int row = 0; row < q_rows; ++row) {
          const int q_idx = q_start + row;
          const auto row_max = saved_row_max(batch, head, q_idx);
          safe_row_max_tile[row] = where(row_max == -INFINITY, 0.0f, row_max);
          inverse_sum_tile[row] = saved_inverse_sum(batch, head, q_idx);
          delta_tile[row] = Delta(batch, head, q_idx);
        }
        const Rows query = tile_of<D>(matrix(Q, batch, head), q_start, q_rows, query_spare);
        const Rows d_out = tile_of<DV>(matrix(dO, batch, head), q_start, q_rows, d_out_spare);
        for (int block = 0; block < q_rows; block += ROWS) {
          Floats sums[ROWS];
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
          multiply_add(sums, DV, d_out[block], d_out.stride, 1, value_packed[0], LANES);
          UNROLL for (int r = 0; r < ROWS; ++r) store(d_probs_tile[block + r], sums[r]);
        }
        Floats tile_sum = fill(0);
        for (int block = 0; block < q_rows; block += ROWS) {
          Floats sums[ROWS];
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
          multiply_add(sums, D, query[block], query.stride, 1, key_packed[0], LANES);
          UNROLL for (int r = 0; r < ROWS; ++r) {
            const int row = block + r;
            const int q_idx = q_start + row;
            const Floats score = sums[r];
            // test_golden.py:37: squashed = cap * torch.tanh(score / cap)
            const auto squashed = cap * tanh(score / cap);
            // test_golden.py:38: distance = q_idx - kv_idx
            const auto distance = q_idx - kv_idx;
            // test_golden.py:39: return squashed - slopes[h] * distance
            const auto logit = squashed - slopes_value * distance;
            // softmax.py:43: below_max = (scores - final_rowscales["row_max"]).min(0.0)
            const auto below_max = min(logit - safe_row_max_tile[row], 0.0f);
            // test_golden.py:42: in_past = kv_idx <= q_idx
            const auto in_past = kv_idx <= q_idx;
            // test_golden.py:43: in_window = q_idx - kv_idx < window
            const auto in_window = q_idx - kv_idx < window;
            const auto visible = in_past & in_window & ((q_idx < q_len) & (kv_idx < kv_len));
            const auto probs = where(visible, exp(below_max) * inverse_sum_tile[row], 0.0f);
            store(probs_tile[row], probs);
            const auto d_logit = probs * (load(d_probs_tile[row]) - delta_tile[row]);
            store(d_score_tile[row], where(visible, d_logit * cap * (1.0f - tanh(score / cap) * tanh(score / cap)) / cap, 0.0f));
            const auto d_slopes_columns_tile = where(visible, -d_logit * distance, 0.0f);
            tile_sum = tile_sum + d_slopes_columns_tile;
          }
        }
        const auto dQ_parts_matrix = matrix(dQ_parts, split, batch, head);
        for (int column = 0; column < D; column += LANES) {
          for (int block = 0; block < q_rows; block += ROWS) {
            Floats sums[ROWS];
            UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
            multiply_add(sums, kv_rows, d_score_tile[block], LANES, 1, key[0] + column, key.stride);
            UNROLL for (int r = 0; r < ROWS; ++r) {
              const int row = block + r;
              const Floats dQ_parts_tile = sums[r];
              if (row < q_rows) add_row<D>(dQ_parts_matrix, q_start + row, column, dQ_parts_tile);
            }
          }
        }
        d_slopes_columns_sum = d_slopes_columns_sum + tile_sum;
        for (int block = 0; block < D; block += ROWS) {
          Floats sums[ROWS];
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
          multiply_add(sums, q_rows, query[0] + block, 1, query.stride, d_score_tile[0], LANES);
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = load(d_key_tile[block + r]) + sums[r];
          UNROLL for (int r = 0; r < ROWS; ++r) store(d_key_tile[block + r], sums[r]);
        }
        for (int block = 0; block < DV; block += ROWS) {
          Floats sums[ROWS];
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
          multiply_add(sums, q_rows, d_out[0] + block, 1, d_out.stride, probs_tile[0], LANES);
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = load(d_value_tile[block + r]) + sums[r];
          UNROLL for (int r = 0; r < ROWS; ++r) store(d_value_tile[block + r], sums[r]);
        }
      };
      for (int q_start = q_begin; q_start < q_full_begin; q_start += BLOCK_Q)
        partial_step(q_start);

      // -- q tiles seen in full: no mask
      const auto full_step = [&](int q_start) __attribute__((noinline)) {
        const int q_rows = min(BLOCK_Q, q_len - q_start);
        for (int row = 0; row < q_rows; ++row) {
          const int q_idx = q_start + row;
          const auto row_max = saved_row_max(batch, head, q_idx);
          safe_row_max_tile[row] = where(row_max == -INFINITY, 0.0f, row_max);
          inverse_sum_tile[row] = saved_inverse_sum(batch, head, q_idx);
          delta_tile[row] = Delta(batch, head, q_idx);
        }
        const Rows query = tile_of<D>(matrix(Q, batch, head), q_start, q_rows, query_spare);
        const Rows d_out = tile_of<DV>(matrix(dO, batch, head), q_start, q_rows, d_out_spare);
        for (int block = 0; block < q_rows; block += ROWS) {
          Floats sums[ROWS];
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
          multiply_add(sums, DV, d_out[block], d_out.stride, 1, value_packed[0], LANES);
          UNROLL for (int r = 0; r < ROWS; ++r) store(d_probs_tile[block + r], sums[r]);
        }
        Floats tile_sum = fill(0);
        for (int block = 0; block < q_rows; block += ROWS) {
          Floats sums[ROWS];
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
          multiply_add(sums, D, query[block], query.stride, 1, key_packed[0], LANES);
          UNROLL for (int r = 0; r < ROWS; ++r) {
            const int row = block + r;
            const int q_idx = q_start + row;
            const Floats score = sums[r];
            // test_golden.py:37: squashed = cap * torch.tanh(score / cap)
            const auto squashed = cap * tanh(score / cap);
            // test_golden.py:38: distance = q_idx - kv_idx
            const auto distance = q_idx - kv_idx;
            // test_golden.py:39: return squashed - slopes[h] * distance
            const auto logit = squashed - slopes_value * distance;
            // softmax.py:43: below_max = (scores - final_rowscales["row_max"]).min(0.0)
            const auto below_max = min(logit - safe_row_max_tile[row], 0.0f);
            const auto probs = exp(below_max) * inverse_sum_tile[row];
            store(probs_tile[row], probs);
            const auto d_logit = probs * (load(d_probs_tile[row]) - delta_tile[row]);
            store(d_score_tile[row], d_logit * cap * (1.0f - tanh(score / cap) * tanh(score / cap)) / cap);
            tile_sum = fma(-d_logit, distance, tile_sum);
          }
        }
        const auto dQ_parts_matrix = matrix(dQ_parts, split, batch, head);
        for (int column = 0; column < D; column += LANES) {
          for (int block = 0; block < q_rows; block += ROWS) {
            Floats sums[ROWS];
            UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
            multiply_add(sums, kv_rows, d_score_tile[block], LANES, 1, key[0] + column, key.stride);
            UNROLL for (int r = 0; r < ROWS; ++r) {
              const int row = block + r;
              const Floats dQ_parts_tile = sums[r];
              if (row < q_rows) add_row<D>(dQ_parts_matrix, q_start + row, column, dQ_parts_tile);
            }
          }
        }
        d_slopes_columns_sum = d_slopes_columns_sum + tile_sum;
        for (int block = 0; block < D; block += ROWS) {
          Floats sums[ROWS];
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
          multiply_add(sums, q_rows, query[0] + block, 1, query.stride, d_score_tile[0], LANES);
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = load(d_key_tile[block + r]) + sums[r];
          UNROLL for (int r = 0; r < ROWS; ++r) store(d_key_tile[block + r], sums[r]);
        }
        for (int block = 0; block < DV; block += ROWS) {
          Floats sums[ROWS];
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
          multiply_add(sums, q_rows, d_out[0] + block, 1, d_out.stride, probs_tile[0], LANES);
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = load(d_value_tile[block + r]) + sums[r];
          UNROLL for (int r = 0; r < ROWS; ++r) store(d_value_tile[block + r], sums[r]);
        }
      };
      for (int q_start = q_full_begin; q_start < q_full_end; q_start += BLOCK_Q)
        full_step(q_start);

      // -- q tiles seen in part: right edge
      for (int q_start = q_full_end; q_start < q_end; q_start += BLOCK_Q)
        partial_step(q_start);
      write(d_slopes_columns, kv_rows, d_slopes_columns_sum, batch, head, kv_idx);
    }

    // -- store
    for (int row = 0; row < D; ++row) store(result_tile[row], load(d_key_tile[row]) * scale);
    unpack_lanes<D>(matrix(dK, batch, kv_head), kv_start, kv_rows, result_tile);
    unpack_lanes<DV>(matrix(dV, batch, kv_head), kv_start, kv_rows, d_value_tile);
  }
}

// Any number of threads may run this on the same arguments; each takes the next task.
extern "C" void attn_engine_backward(Arguments* arguments) {
  const int64_t tasks = arguments->splits * arguments->kv_heads * arguments->batches;
  Scratch* scratch = (Scratch*)aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&arguments->next_task, 1, __ATOMIC_RELAXED);
    if (task >= tasks) break;
    tile_task(*arguments, *scratch, task % arguments->splits, task / arguments->splits % arguments->kv_heads, task / (arguments->splits * arguments->kv_heads));
  }
  free(scratch);
}

}  // namespace attention
