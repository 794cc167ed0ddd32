// attn_engine golden | select_weighed_causal_mask_Importance: select | cpu
// rows of a tile are the query heads that share a kv head
#define LANE_REGISTERS 4
#include "kernel.h"

namespace attention {

constexpr int BLOCK_Q = 64, BLOCK_KV = 64, D = 64;
static_assert(BLOCK_KV == LANES, "one key per lane");

struct Arguments {  // 8 bytes each: the launcher fills them in this order
  int64_t next_task;  // shared by the threads
  Tensor<const float, 5> Q;
  Tensor<const float, 4> K;
  Tensor<const float, 3> w;
  Tensor<int32_t, 5> candidates;
  Tensor<int32_t, 4> indices;
  int64_t batches, heads, kv_heads, q_len, kv_len;
  double scale;
  int64_t topk;
  int64_t tokens;
  int64_t tile_count;
  int64_t first_tile;
  int64_t tile_tokens;
};
static_assert(sizeof(Arguments) == 8 * 59);

struct Scratch {  // of one thread
  alignas(64) Real key_packed[D][LANES];
  alignas(64) Real query_spare[BLOCK_Q][D];
};

static void tile_task(const Arguments& arguments, Scratch& scratch, int tile, int kv_head, int batch) {
  const auto& Q = arguments.Q;
  const auto& K = arguments.K;
  const auto& w = arguments.w;
  const auto& candidates = arguments.candidates;
  const auto& indices = arguments.indices;
  const int q_len = arguments.q_len, kv_len = arguments.kv_len;
  const Real scale = arguments.scale;
  const int topk = arguments.topk;
  const int tokens = arguments.tokens;
  const int first_tile = arguments.first_tile;
  const int tile_tokens = arguments.tile_tokens;
  auto& key_packed = scratch.key_packed;
  auto& query_spare = scratch.query_spare;

  // -- tokens of this program
  const int first_token = (first_tile + tile) * tile_tokens;
  const int token_end = min(first_token + tile_tokens, tokens);
  if (first_token < token_end) {

    // -- kv tiles that these tokens can see
    const int last_token = token_end - 1;
    const int kv_begin = 0;
    const int kv_end = max(floor_div(min(last_token + 1, kv_len) + 63, 64) * 64, kv_begin);
    for (int token = first_token; token < token_end; ++token) {
      begin(state_of(candidates, topk, 0, batch, kv_head, tile * tile_tokens + (token - first_token)), kv_begin);
    }

    // -- importances, tile by tile
    for (int kv_start = kv_begin; kv_start < kv_end; kv_start += BLOCK_KV) {
      const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
      const Positions kv_idx = positions(kv_start);
      pack_lanes<D>(key_packed, matrix(K, batch, kv_head), kv_start, kv_rows, scale);
      for (int token = first_token; token < token_end; ++token) {
        Floats importance = fill(0.0f);
        const auto step = [&](int q_start) __attribute__((noinline)) {
          const int q_rows = min(BLOCK_Q, q_len - q_start);
          const Rows query = tile_of<D>(matrix(Q, batch, token, kv_head), q_start, q_rows, query_spare);
          Floats tile_sum = fill(0);
          for (int block = 0; block < q_rows; block += ROWS) {
            fetch_share<D, BLOCK_KV, BLOCK_Q>(matrix(K, batch, kv_head), kv_start + LANES, block);
            Floats sums[ROWS];
            UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
            multiply_add(sums, D, query[block], query.stride, 1, key_packed[0], LANES);
            UNROLL for (int r = 0; r < ROWS; ++r) {
              const int row = block + r;
              const int q_idx = q_start + row;
              const Floats score = sums[r];
              // test_showcase.py:23: positive = torch.relu(score)
              const auto positive = where(0.0f < score, score, 0.0f);
              // test_showcase.py:24: return positive * custom.input_tensors["w"][b, q_idx, h]
              const auto logit = positive * w(batch, token, kv_head * q_len + q_idx);
              tile_sum = tile_sum + where(q_idx < q_len, logit, fill(0.0f));
            }
          }
          importance = importance + tile_sum;
        };
        for (int q_start = 0; q_start < floor_div(q_len + 63, 64) * 64; q_start += BLOCK_Q)
          step(q_start);
        const auto visible = (kv_idx <= token) & (kv_idx < kv_len);
        offer(state_of(candidates, topk, 0, batch, kv_head, tile * tile_tokens + (token - first_token)), kv_start, where(visible, importance, -INFINITY));
      }
    }

    // -- the best of each token
    for (int token = first_token; token < token_end; ++token) {
      settle(candidates, topk, 1, batch, kv_head, tile * tile_tokens + (token - first_token), indices, batch, kv_head, token);
    }
  }
}

// Any number of threads may run this on the same arguments; each takes the next task.
extern "C" void attn_engine_select(Arguments* arguments) {
  const int64_t tasks = arguments->tile_count * arguments->kv_heads * arguments->batches;
  Scratch* scratch = (Scratch*)aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&arguments->next_task, 1, __ATOMIC_RELAXED);
    if (task >= tasks) break;
    tile_task(*arguments, *scratch, task % arguments->tile_count, task / arguments->tile_count % arguments->kv_heads, task / (arguments->tile_count * arguments->kv_heads));
  }
  free(scratch);
}

}  // namespace attention
