// attn_engine golden | score_mod_mask_mod_OnlineSoftmax: forward | cpu | block_q=2 block_kv=128
// regenerate: engine.source(backend="cpu", kernel="decode")
#define LANE_REGISTERS 2
#include "kernel.h"

namespace attention {

constexpr int BLOCK_Q = 2, BLOCK_KV = 128, D = 64, DV = 64;
static_assert(BLOCK_KV % LANES == 0, "whole vectors of keys");

struct Arguments {  // 8 bytes each: the launcher fills them in this order
  int64_t next_task;  // shared by the threads
  Tensor<const BFloat16, 4> Q;
  Tensor<const BFloat16, 4> K;
  Tensor<const BFloat16, 4> V;
  Tensor<const float, 1> slopes;
  Tensor<BFloat16, 4> O;
  Tensor<float, 3> saved_lse;
  Tensor<float, 3> saved_row_max;
  Tensor<float, 3> saved_inverse_sum;
  int64_t batches, heads, kv_heads, q_len, kv_len;
  double scale;
  double cap;
  int64_t window;
};
static_assert(sizeof(Arguments) == 8 * 69);

struct Scratch {  // of one thread
  alignas(64) Real query_packed[BLOCK_Q][round_up(D, WIDTH)];
  alignas(64) Real out_tile[BLOCK_Q][round_up(DV, LANES)];
  alignas(64) Real row_max_tile[BLOCK_Q];
  alignas(64) Real row_sum_tile[BLOCK_Q];
  alignas(64) Real score_tile[BLOCK_Q][round_up(BLOCK_KV, LANES)];
  alignas(64) Real masked_logit_tile[BLOCK_Q][round_up(BLOCK_KV, LANES)];
  alignas(64) Real tile_max_tile[BLOCK_Q];
  alignas(64) Real rescale_tile[BLOCK_Q];
  alignas(64) Real tile_sum_tile[BLOCK_Q];
  alignas(64) Real logit_tile[BLOCK_Q][round_up(BLOCK_KV, LANES)];
  alignas(64) Real inverse_sum_tile[BLOCK_Q];
};

static void tile_task(const Arguments& arguments, Scratch& scratch, int q_start, int head, int batch) {
  const auto& Q = arguments.Q;
  const auto& K = arguments.K;
  const auto& V = arguments.V;
  const auto& slopes = arguments.slopes;
  const auto& O = arguments.O;
  const auto& saved_lse = arguments.saved_lse;
  const auto& saved_row_max = arguments.saved_row_max;
  const auto& saved_inverse_sum = arguments.saved_inverse_sum;
  const int heads = arguments.heads, kv_heads = arguments.kv_heads, q_len = arguments.q_len, kv_len = arguments.kv_len;
  const Real scale = arguments.scale;
  const Real cap = arguments.cap;
  const int window = arguments.window;
  auto& query_packed = scratch.query_packed;
  auto& out_tile = scratch.out_tile;
  auto& row_max_tile = scratch.row_max_tile;
  auto& row_sum_tile = scratch.row_sum_tile;
  auto& score_tile = scratch.score_tile;
  auto& masked_logit_tile = scratch.masked_logit_tile;
  auto& tile_max_tile = scratch.tile_max_tile;
  auto& rescale_tile = scratch.rescale_tile;
  auto& tile_sum_tile = scratch.tile_sum_tile;
  auto& logit_tile = scratch.logit_tile;
  auto& inverse_sum_tile = scratch.inverse_sum_tile;
  const int q_rows = min(BLOCK_Q, q_len - q_start);

  // -- query tile of this program
  const int kv_head = floor_div(head, floor_div(heads, kv_heads));
  pack_rows<D>(query_packed, matrix(Q, batch, head), q_start, q_rows, scale);
  const Real slopes_value = slopes(head);

  // -- row state of OnlineSoftmax
  for (int row = 0; row < BLOCK_Q; ++row) {
    for (int column = 0; column < DV; column += LANES)
      store(out_tile[row] + column, fill(0.0f));
  }
  for (int row = 0; row < BLOCK_Q; ++row) {
    row_max_tile[row] = -INFINITY;
    row_sum_tile[row] = 0.0f;
  }

  // -- kv tiles this tile can see
  const int q_last = min(q_start + 1, q_len - 1);
  const int kv_begin = max(floor_div(q_start - (window - 1), 128) * 128, 0);
  const int kv_end = max(floor_div(min(q_last + 1, kv_len) + 127, 128) * 128, kv_begin);
  const int kv_full_begin = min(max(floor_div(q_last - (window - 1) + 127, 128) * 128, kv_begin), kv_end);
  const int kv_full_end = max(min(floor_div(min(q_start + 1, kv_len), 128) * 128, kv_end), kv_full_begin);

  // -- kv tiles seen in part: left edge
  const auto partial_step = [&](int kv_start) __attribute__((noinline)) {
    const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
    const auto key = from_row(matrix(K, batch, kv_head), kv_start);
    const auto value = from_row(matrix(V, batch, kv_head), kv_start);
    inner_products<D>(score_tile, query_packed, key, kv_rows);
    for (int row = 0; row < BLOCK_Q; ++row) {
      const int q_idx = q_start + row;
      Floats tile_max = fill(-INFINITY);
      for (int column = 0; column < kv_rows; column += LANES) {
        const Positions kv_idx = positions(kv_start + column);
        // test_golden.py:37: squashed = cap * torch.tanh(score / cap)
        const auto squashed = cap * tanh(load(score_tile[row] + column) / cap);
        // test_golden.py:38: distance = q_idx - kv_idx
        const auto distance = q_idx - kv_idx;
        // test_golden.py:39: return squashed - slopes[h] * distance
        const auto logit = squashed - slopes_value * distance;
        // test_golden.py:42: in_past = kv_idx <= q_idx
        const auto in_past = kv_idx <= q_idx;
        // test_golden.py:43: in_window = q_idx - kv_idx < window
        const auto in_window = q_idx - kv_idx < window;
        const auto visible = in_past & in_window & (kv_idx < kv_len);
        const auto masked_logit = where(visible, logit, -INFINITY);
        store(masked_logit_tile[row] + column, masked_logit);
        tile_max = max(tile_max, masked_logit);
      }
      tile_max_tile[row] = max_lanes(tile_max);
    }
    for (int row = 0; row < BLOCK_Q; ++row) {
      // softmax.py:27: new_max = old_max.max(scores.get_reduce("max"))
      const auto new_max = max(row_max_tile[row], tile_max_tile[row]);
      const auto safe_row_max = where(new_max == -INFINITY, 0.0f, new_max);
      // softmax.py:28: rescale = torch.exp(old_max - new_max)
      rescale_tile[row] = exp(row_max_tile[row] - safe_row_max);
      row_max_tile[row] = new_max;
      Floats tile_sum = fill(0);
      for (int column = 0; column < kv_rows; column += LANES) {
        const auto probs = exp(load(masked_logit_tile[row] + column) - safe_row_max);
        store(masked_logit_tile[row] + column, probs);
        tile_sum = tile_sum + probs;
      }
      tile_sum_tile[row] = sum_lanes(tile_sum);
    }
    for (int row = 0; row < BLOCK_Q; ++row) {
      for (int column = 0; column < DV; column += LANES)
        store(out_tile[row] + column, load(out_tile[row] + column) * rescale_tile[row]);
    }
    add_products<DV>(out_tile, masked_logit_tile, value, kv_rows);
    for (int row = 0; row < BLOCK_Q; ++row) {
      // softmax.py:30: new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
      const auto new_sum = row_sum_tile[row] * rescale_tile[row] + tile_sum_tile[row];
      row_sum_tile[row] = new_sum;
    }
  };
  for (int kv_start = kv_begin; kv_start < kv_full_begin; kv_start += BLOCK_KV)
    partial_step(kv_start);

  // -- kv tiles seen in full: no mask
  const auto full_step = [&](int kv_start) __attribute__((noinline)) {
    const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
    const auto key = from_row(matrix(K, batch, kv_head), kv_start);
    const auto value = from_row(matrix(V, batch, kv_head), kv_start);
    inner_products<D>(score_tile, query_packed, key, kv_rows);
    for (int row = 0; row < BLOCK_Q; ++row) {
      const int q_idx = q_start + row;
      Floats tile_max = fill(-INFINITY);
      for (int column = 0; column < kv_rows; column += LANES) {
        const Positions kv_idx = positions(kv_start + column);
        // test_golden.py:37: squashed = cap * torch.tanh(score / cap)
        const auto squashed = cap * tanh(load(score_tile[row] + column) / cap);
        // test_golden.py:38: distance = q_idx - kv_idx
        const auto distance = q_idx - kv_idx;
        // test_golden.py:39: return squashed - slopes[h] * distance
        const auto logit = squashed - slopes_value * distance;
        store(logit_tile[row] + column, logit);
        tile_max = max(tile_max, logit);
      }
      tile_max_tile[row] = max_lanes(tile_max);
    }
    for (int row = 0; row < BLOCK_Q; ++row) {
      // softmax.py:27: new_max = old_max.max(scores.get_reduce("max"))
      const auto new_max = max(row_max_tile[row], tile_max_tile[row]);
      const auto safe_row_max = where(new_max == -INFINITY, 0.0f, new_max);
      // softmax.py:28: rescale = torch.exp(old_max - new_max)
      rescale_tile[row] = exp(row_max_tile[row] - safe_row_max);
      row_max_tile[row] = new_max;
      Floats tile_sum = fill(0);
      for (int column = 0; column < kv_rows; column += LANES) {
        const auto probs = exp(load(logit_tile[row] + column) - safe_row_max);
        store(logit_tile[row] + column, probs);
        tile_sum = tile_sum + probs;
      }
      tile_sum_tile[row] = sum_lanes(tile_sum);
    }
    for (int row = 0; row < BLOCK_Q; ++row) {
      for (int column = 0; column < DV; column += LANES)
        store(out_tile[row] + column, load(out_tile[row] + column) * rescale_tile[row]);
    }
    add_products<DV>(out_tile, logit_tile, value, kv_rows);
    for (int row = 0; row < BLOCK_Q; ++row) {
      // softmax.py:30: new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
      const auto new_sum = row_sum_tile[row] * rescale_tile[row] + tile_sum_tile[row];
      row_sum_tile[row] = new_sum;
    }
  };
  for (int kv_start = kv_full_begin; kv_start < kv_full_end; kv_start += BLOCK_KV)
    full_step(kv_start);

  // -- kv tiles seen in part: right edge
  for (int kv_start = kv_full_end; kv_start < kv_end; kv_start += BLOCK_KV)
    partial_step(kv_start);

  // -- normalise and store
  for (int row = 0; row < q_rows; ++row) {
    const int q_idx = q_start + row;
    // softmax.py:36: inverse_sum = torch.where(total > 0, 1.0 / total, 0.0)
    const auto inverse_sum = where(0.0f < row_sum_tile[row], 1.0f / row_sum_tile[row], 0.0f);
    inverse_sum_tile[row] = inverse_sum;
    write(saved_lse, 1, row_max_tile[row] + log(row_sum_tile[row]), batch, head, q_idx);
    write(saved_row_max, 1, row_max_tile[row], batch, head, q_idx);
    write(saved_inverse_sum, 1, inverse_sum, batch, head, q_idx);
  }
  const auto O_matrix = matrix(O, batch, head);
  for (int row = 0; row < q_rows; ++row) {
    for (int column = 0; column < DV; column += LANES)
      write_row<DV>(O_matrix, q_start + row, column, load(out_tile[row] + column) * inverse_sum_tile[row]);
  }
}

// Any number of threads may run this on the same arguments; each takes the next task.
extern "C" void attn_engine_forward(Arguments* arguments) {
  const int64_t q_tiles = (arguments->q_len + BLOCK_Q - 1) / BLOCK_Q;
  const int64_t tasks = q_tiles * arguments->heads * arguments->batches;
  Scratch* scratch = (Scratch*)aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&arguments->next_task, 1, __ATOMIC_RELAXED);
    if (task >= tasks) break;
    tile_task(*arguments, *scratch, (task % q_tiles) * BLOCK_Q, task / q_tiles % arguments->heads, task / (q_tiles * arguments->heads));
  }
  free(scratch);
}

}  // namespace attention
