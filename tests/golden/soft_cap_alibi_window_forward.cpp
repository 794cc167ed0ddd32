// attn_engine golden | score_mod_mask_mod_OnlineSoftmax: forward | cpu | block_q=64 block_kv=64
// regenerate: engine.source(backend="cpu", kernel="forward")
#define LANE_REGISTERS 4
#include "kernel.h"

namespace attention {

constexpr int BLOCK_Q = 64, BLOCK_KV = 64, D = 64, DV = 64;
static_assert(BLOCK_Q == LANES, "one query row per lane");

struct Arguments {  // 8 bytes each: the launcher fills them in this order
  int64_t next_task;  // shared by the threads
  Tensor<const float, 4> Q;
  Tensor<const float, 4> K;
  Tensor<const float, 4> V;
  Tensor<const float, 1> slopes;
  Tensor<float, 4> O;
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
  alignas(64) Real query_packed[D][LANES];
  alignas(64) Real out_tile[round_up(DV, ROWS)][LANES];
  alignas(64) Real key_spare[BLOCK_KV][D];
  alignas(64) Real value_spare[BLOCK_KV][round_up(DV, ROWS)];
  alignas(64) Real masked_logit_tile[BLOCK_KV][LANES];
  alignas(64) Real logit_tile[BLOCK_KV][LANES];
  alignas(64) Real result_tile[round_up(DV, ROWS)][LANES];
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
  auto& key_spare = scratch.key_spare;
  auto& value_spare = scratch.value_spare;
  auto& masked_logit_tile = scratch.masked_logit_tile;
  auto& logit_tile = scratch.logit_tile;
  auto& result_tile = scratch.result_tile;
  const int q_rows = min(BLOCK_Q, q_len - q_start);
  const Positions q_idx = positions(q_start);

  // -- query tile of this program
  const int kv_head = floor_div(head, floor_div(heads, kv_heads));
  pack_lanes<D>(query_packed, matrix(Q, batch, head), q_start, q_rows, scale);
  const Real slopes_value = slopes(head);

  // -- row state of OnlineSoftmax
  for (int row = 0; row < DV; ++row) store(out_tile[row], fill(0.0f));
  Floats row_max = fill(-INFINITY);
  Floats row_sum = fill(0.0f);

  // -- kv tiles this tile can see
  const int q_last = min(q_start + 63, q_len - 1);
  const int kv_begin = max(floor_div(q_start - (window - 1), 64) * 64, 0);
  const int kv_end = max(floor_div(min(q_last + 1, kv_len) + 63, 64) * 64, kv_begin);
  const int kv_full_begin = min(max(floor_div(q_last - (window - 1) + 63, 64) * 64, kv_begin), kv_end);
  const int kv_full_end = max(min(floor_div(min(q_start + 1, kv_len), 64) * 64, kv_end), kv_full_begin);

  // -- kv tiles seen in part: left edge
  const auto partial_step = [&](int kv_start) __attribute__((noinline)) {
    const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
    const Rows key = tile_of<D>(matrix(K, batch, kv_head), kv_start, kv_rows, key_spare);
    const Rows value = tile_of<DV>(matrix(V, batch, kv_head), kv_start, kv_rows, value_spare);
    Floats tile_max = fill(-INFINITY);
    for (int block = 0; block < kv_rows; block += ROWS) {
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, D, key[block], key.stride, 1, query_packed[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        const int row = block + r;
        const int kv_idx = kv_start + row;
        const Floats score = sums[r];
        // test_golden.py:37: squashed = cap * torch.tanh(score / cap)
        const auto squashed = cap * tanh(score / cap);
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
        store(masked_logit_tile[row], masked_logit);
        tile_max = max(tile_max, masked_logit);
      }
    }
    // softmax.py:27: new_max = old_max.max(scores.get_reduce("max"))
    const auto new_max = max(row_max, tile_max);
    const auto safe_row_max = where(new_max == -INFINITY, 0.0f, new_max);
    // softmax.py:28: rescale = torch.exp(old_max - new_max)
    const auto rescale = exp(row_max - safe_row_max);
    row_max = new_max;
    Floats tile_sum = fill(0);
    for (int row = 0; row < kv_rows; ++row) {
      const auto probs = exp(load(masked_logit_tile[row]) - safe_row_max);
      store(masked_logit_tile[row], probs);
      tile_sum = tile_sum + probs;
    }
    for (int block = 0; block < DV; block += ROWS) {
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, kv_rows, value[0] + block, 1, value.stride, masked_logit_tile[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = load(out_tile[block + r]) * rescale + sums[r];
      UNROLL for (int r = 0; r < ROWS; ++r) store(out_tile[block + r], sums[r]);
    }
    // softmax.py:30: new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
    const auto new_sum = row_sum * rescale + tile_sum;
    row_sum = new_sum;
  };
  for (int kv_start = kv_begin; kv_start < kv_full_begin; kv_start += BLOCK_KV)
    partial_step(kv_start);

  // -- kv tiles seen in full: no mask
  const auto full_step = [&](int kv_start) __attribute__((noinline)) {
    const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
    const Rows key = tile_of<D>(matrix(K, batch, kv_head), kv_start, kv_rows, key_spare);
    const Rows value = tile_of<DV>(matrix(V, batch, kv_head), kv_start, kv_rows, value_spare);
    Floats tile_max = fill(-INFINITY);
    for (int block = 0; block < kv_rows; block += ROWS) {
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, D, key[block], key.stride, 1, query_packed[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        const int row = block + r;
        const int kv_idx = kv_start + row;
        const Floats score = sums[r];
        // test_golden.py:37: squashed = cap * torch.tanh(score / cap)
        const auto squashed = cap * tanh(score / cap);
        // test_golden.py:38: distance = q_idx - kv_idx
        const auto distance = q_idx - kv_idx;
        // test_golden.py:39: return squashed - slopes[h] * distance
        const auto logit = squashed - slopes_value * distance;
        store(logit_tile[row], logit);
        tile_max = max(tile_max, logit);
      }
    }
    // softmax.py:27: new_max = old_max.max(scores.get_reduce("max"))
    const auto new_max = max(row_max, tile_max);
    const auto safe_row_max = where(new_max == -INFINITY, 0.0f, new_max);
    // softmax.py:28: rescale = torch.exp(old_max - new_max)
    const auto rescale = exp(row_max - safe_row_max);
    row_max = new_max;
    Floats tile_sum = fill(0);
    for (int row = 0; row < kv_rows; ++row) {
      const auto probs = exp(load(logit_tile[row]) - safe_row_max);
      store(logit_tile[row], probs);
      tile_sum = tile_sum + probs;
    }
    for (int block = 0; block < DV; block += ROWS) {
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, kv_rows, value[0] + block, 1, value.stride, logit_tile[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = load(out_tile[block + r]) * rescale + sums[r];
      UNROLL for (int r = 0; r < ROWS; ++r) store(out_tile[block + r], sums[r]);
    }
    // softmax.py:30: new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
    const auto new_sum = row_sum * rescale + tile_sum;
    row_sum = new_sum;
  };
  for (int kv_start = kv_full_begin; kv_start < kv_full_end; kv_start += BLOCK_KV)
    full_step(kv_start);

  // -- kv tiles seen in part: right edge
  for (int kv_start = kv_full_end; kv_start < kv_end; kv_start += BLOCK_KV)
    partial_step(kv_start);

  // -- normalise and store
  // softmax.py:36: inverse_sum = torch.where(total > 0, 1.0 / total, 0.0)
  const auto inverse_sum = where(0.0f < row_sum, 1.0f / row_sum, 0.0f);
  write(saved_lse, q_rows, row_max + log(row_sum), batch, head, q_idx);
  write(saved_row_max, q_rows, row_max, batch, head, q_idx);
  write(saved_inverse_sum, q_rows, inverse_sum, batch, head, q_idx);
  for (int row = 0; row < DV; ++row) store(result_tile[row], load(out_tile[row]) * inverse_sum);
  unpack_lanes<DV>(matrix(O, batch, head), q_start, q_rows, result_tile);
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
