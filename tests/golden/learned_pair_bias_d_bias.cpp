// attn_engine golden | score_mod_OnlineSoftmax: backward, d_bias | cpu | block_q=64 block_kv=64
// regenerate: engine.source(backend="cpu", kernel="d_bias")
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
  Tensor<const float, 4> dO;
  Tensor<const float, 3> saved_row_max;
  Tensor<const float, 3> saved_inverse_sum;
  Tensor<const float, 3> Delta;
  Tensor<const float, 3> bias;
  Tensor<float, 3> d_bias;
  int64_t batches, heads, kv_heads, q_len, kv_len;
  double scale;
};
static_assert(sizeof(Arguments) == 8 * 78);

struct Scratch {  // of one thread
  alignas(64) Real query_packed[D][LANES];
  alignas(64) Real d_out_packed[DV][LANES];
  alignas(64) Real key_spare[BLOCK_KV][D];
  alignas(64) Real value_spare[BLOCK_KV][DV];
  alignas(64) Real d_probs_tile[BLOCK_KV][LANES];
};

static void tile_task(const Arguments& arguments, Scratch& scratch, int q_start, int head) {
  const auto& Q = arguments.Q;
  const auto& K = arguments.K;
  const auto& V = arguments.V;
  const auto& dO = arguments.dO;
  const auto& saved_row_max = arguments.saved_row_max;
  const auto& saved_inverse_sum = arguments.saved_inverse_sum;
  const auto& Delta = arguments.Delta;
  const auto& bias = arguments.bias;
  const auto& d_bias = arguments.d_bias;
  const int batches = arguments.batches, heads = arguments.heads, kv_heads = arguments.kv_heads, q_len = arguments.q_len, kv_len = arguments.kv_len;
  const Real scale = arguments.scale;
  auto& query_packed = scratch.query_packed;
  auto& d_out_packed = scratch.d_out_packed;
  auto& key_spare = scratch.key_spare;
  auto& value_spare = scratch.value_spare;
  auto& d_probs_tile = scratch.d_probs_tile;
  const int q_rows = min(BLOCK_Q, q_len - q_start);
  const Positions q_idx = positions(q_start);
  for (int batch = 0; batch < batches; ++batch) {
    const int kv_head = floor_div(head, floor_div(heads, kv_heads));
    pack_lanes<D>(query_packed, matrix(Q, batch, head), q_start, q_rows, scale);
    pack_lanes<DV>(d_out_packed, matrix(dO, batch, head), q_start, q_rows, 1.0f);
    const auto row_max = saved_row_max(batch, head, q_idx);
    const auto safe_row_max = where(row_max == -INFINITY, 0.0f, row_max);
    const auto inverse_sum = saved_inverse_sum(batch, head, q_idx);
    const auto delta = Delta(batch, head, q_idx);
    const int kv_begin = 0;
    const int kv_end = max(floor_div(kv_len + 63, 64) * 64, kv_begin);
    const int kv_full_end = max(min(floor_div(where(q_start + 64 <= q_len, kv_len, 0), 64) * 64, kv_end), kv_begin);

    // -- kv tiles seen in full: no mask
    const auto full_step = [&](int kv_start) __attribute__((noinline)) {
      const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
      const Rows key = tile_of<D>(matrix(K, batch, kv_head), kv_start, kv_rows, key_spare);
      const Rows value = tile_of<DV>(matrix(V, batch, kv_head), kv_start, kv_rows, value_spare);
      for (int block = 0; block < kv_rows; block += ROWS) {
        Floats sums[ROWS];
        UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
        multiply_add(sums, DV, value[block], value.stride, 1, d_out_packed[0], LANES);
        UNROLL for (int r = 0; r < ROWS; ++r) store(d_probs_tile[block + r], sums[r]);
      }
      for (int block = 0; block < kv_rows; block += ROWS) {
        Floats sums[ROWS];
        UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
        multiply_add(sums, D, key[block], key.stride, 1, query_packed[0], LANES);
        UNROLL for (int r = 0; r < ROWS; ++r) {
          const int row = block + r;
          const int kv_idx = kv_start + row;
          const Floats score = sums[r];
          // test_golden.py:62: return score + bias[h, q_idx, kv_idx]
          const auto logit = score + bias(head, q_idx, kv_idx);
          // normalisers.py:43: below_max = (scores - final_rowscales["row_max"]).min(0.0)
          const auto below_max = min(logit - safe_row_max, 0.0f);
          const auto probs = exp(below_max) * inverse_sum;
          const auto d_logit = probs * (load(d_probs_tile[row]) - delta);
          const auto d_score = d_logit;
          const auto d_bias_tile = d_logit;
          if (row < kv_rows) add(d_bias, q_rows, d_bias_tile, head, q_idx, kv_idx);
        }
      }
    };
    for (int kv_start = kv_begin; kv_start < kv_full_end; kv_start += BLOCK_KV)
      full_step(kv_start);

    // -- kv tiles seen in part: right edge
    const auto partial_step = [&](int kv_start) __attribute__((noinline)) {
      const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
      const Rows key = tile_of<D>(matrix(K, batch, kv_head), kv_start, kv_rows, key_spare);
      const Rows value = tile_of<DV>(matrix(V, batch, kv_head), kv_start, kv_rows, value_spare);
      for (int block = 0; block < kv_rows; block += ROWS) {
        Floats sums[ROWS];
        UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
        multiply_add(sums, DV, value[block], value.stride, 1, d_out_packed[0], LANES);
        UNROLL for (int r = 0; r < ROWS; ++r) store(d_probs_tile[block + r], sums[r]);
      }
      for (int block = 0; block < kv_rows; block += ROWS) {
        Floats sums[ROWS];
        UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
        multiply_add(sums, D, key[block], key.stride, 1, query_packed[0], LANES);
        UNROLL for (int r = 0; r < ROWS; ++r) {
          const int row = block + r;
          const int kv_idx = kv_start + row;
          const Floats score = sums[r];
          // test_golden.py:62: return score + bias[h, q_idx, kv_idx]
          const auto logit = score + bias(head, q_idx, kv_idx);
          // normalisers.py:43: below_max = (scores - final_rowscales["row_max"]).min(0.0)
          const auto below_max = min(logit - safe_row_max, 0.0f);
          const auto visible = (q_idx < q_len) & (kv_idx < kv_len);
          const auto probs = where(visible, exp(below_max) * inverse_sum, 0.0f);
          const auto d_logit = probs * (load(d_probs_tile[row]) - delta);
          const auto d_score = where(visible, d_logit, 0.0f);
          const auto d_bias_tile = where(visible, d_logit, 0.0f);
          if (row < kv_rows) add(d_bias, q_rows, d_bias_tile, head, q_idx, kv_idx);
        }
      }
    };
    for (int kv_start = kv_full_end; kv_start < kv_end; kv_start += BLOCK_KV)
      partial_step(kv_start);
  }
}

// Any number of threads may run this on the same arguments; each takes the next task.
extern "C" void attn_engine_d_bias(Arguments* arguments) {
  const int64_t q_tiles = (arguments->q_len + BLOCK_Q - 1) / BLOCK_Q;
  const int64_t tasks = q_tiles * arguments->heads;
  Scratch* scratch = (Scratch*)aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&arguments->next_task, 1, __ATOMIC_RELAXED);
    if (task >= tasks) break;
    tile_task(*arguments, *scratch, (task % q_tiles) * BLOCK_Q, task / q_tiles);
  }
  free(scratch);
}

}  // namespace attention
