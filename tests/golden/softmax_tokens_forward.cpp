// attn_engine golden | causal_OnlineSoftmax: forward | cpu | block_q=16 block_kv=64
// regenerate: engine.source(backend="cpu", kernel="forward")
#define LANE_REGISTERS 1
#include "kernel.h"

namespace attention {

constexpr int BLOCK_Q = 16, BLOCK_KV = 64, D = 64, DV = 64;
static_assert(BLOCK_Q == LANES, "one query row per lane");

struct Arguments {  // 8 bytes each: the launcher fills them in this order
  int64_t next_task;  // shared by the threads
  Tensor<const float, 4> Q;
  Tensor<const float, 4> K;
  Tensor<const float, 4> V;
  Tensor<const int32_t, 3> kv_partial_starts;
  Tensor<const int32_t, 1> kv_partial_blocks;
  Tensor<const int32_t, 3> kv_full_starts;
  Tensor<const int32_t, 1> kv_full_blocks;
  Tensor<const int32_t, 1> kv_partial_seen;
  Tensor<float, 4> O;
  Tensor<float, 3> saved_lse;
  Tensor<float, 3> saved_row_max;
  Tensor<float, 3> saved_inverse_sum;
  int64_t batches, heads, kv_heads, q_len, kv_len;
  double scale;
};
static_assert(sizeof(Arguments) == 8 * 87);

struct Scratch {  // of one thread
  alignas(64) Real query_packed[D][LANES];
  alignas(64) Real out_tile[round_up(DV, ROWS)][LANES];
  alignas(64) Real key_spare[BLOCK_KV][D];
  alignas(64) Real value_spare[BLOCK_KV][round_up(DV, ROWS)];
  alignas(64) Real masked_score_tile[BLOCK_KV][LANES];
  alignas(64) Real score_tile[BLOCK_KV][LANES];
  alignas(64) Real result_tile[round_up(DV, ROWS)][LANES];
};

static void tile_task(const Arguments& arguments, Scratch& scratch, int q_start, int head, int batch) {
  const auto& Q = arguments.Q;
  const auto& K = arguments.K;
  const auto& V = arguments.V;
  const auto& kv_partial_starts = arguments.kv_partial_starts;
  const auto& kv_partial_blocks = arguments.kv_partial_blocks;
  const auto& kv_full_starts = arguments.kv_full_starts;
  const auto& kv_full_blocks = arguments.kv_full_blocks;
  const auto& kv_partial_seen = arguments.kv_partial_seen;
  const auto& O = arguments.O;
  const auto& saved_lse = arguments.saved_lse;
  const auto& saved_row_max = arguments.saved_row_max;
  const auto& saved_inverse_sum = arguments.saved_inverse_sum;
  const int heads = arguments.heads, kv_heads = arguments.kv_heads, q_len = arguments.q_len, kv_len = arguments.kv_len;
  const Real scale = arguments.scale;
  auto& query_packed = scratch.query_packed;
  auto& out_tile = scratch.out_tile;
  auto& key_spare = scratch.key_spare;
  auto& value_spare = scratch.value_spare;
  auto& masked_score_tile = scratch.masked_score_tile;
  auto& score_tile = scratch.score_tile;
  auto& result_tile = scratch.result_tile;
  const int q_rows = min(BLOCK_Q, q_len - q_start);
  const Positions q_idx = positions(q_start);

  // -- query tile of this program
  const int kv_head = floor_div(head, floor_div(heads, kv_heads));
  pack_lanes<D>(query_packed, matrix(Q, batch, head), q_start, q_rows, scale);
  const auto position = floor_div(q_idx, 8);

  // -- row state of OnlineSoftmax
  for (int row = 0; row < DV; ++row) store(out_tile[row], fill(0.0f));
  Floats row_max = fill(-INFINITY);
  Floats row_sum = fill(0.0f);

  // -- kv tiles this tile can see
  const int q_last = min(q_start + 15, q_len - 1);
  const int kv_begin = 0;
  const int kv_end = max(floor_div(min(floor_div(q_last, 8) + 1, kv_len) + 63, 64) * 64, kv_begin);
  const int kv_full_end = max(min(floor_div(min(floor_div(q_start, 8) + 1, kv_len), 64) * 64, kv_end), kv_begin);
  const int q_block = floor_div(q_start, 16);
  const int partial_begin = kv_partial_starts(batch, kv_head, q_block);
  const int partial_end = kv_partial_starts(batch, kv_head, q_block + 1);
  const int full_begin = kv_full_starts(batch, kv_head, q_block);
  const int full_end = kv_full_starts(batch, kv_head, q_block + 1);
  const auto part = floor_mod(floor_div(q_idx, 8), 2);

  // -- given kv blocks of which parts are visible
  for (int entry = partial_begin; entry < partial_end; ++entry) {
    const int kv_next = kv_partial_blocks(min(entry + 1, partial_end - 1)) * 64;
    const int kv_block = kv_partial_blocks(entry);
    const int seen = kv_partial_seen(entry);
    const auto partial_step = [&](int kv_start, int kv_next) __attribute__((noinline)) {
      const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
      const Rows key = tile_of<D, false>(matrix(K, batch, kv_head), kv_start, kv_rows, key_spare);
      const Rows value = tile_of<DV, false>(matrix(V, batch, kv_head), kv_start, kv_rows, value_spare);
      Floats tile_max = fill(-INFINITY);
      for (int block = 0; block < kv_rows; block += ROWS) {
        fetch_share<D, BLOCK_KV, BLOCK_KV>(matrix(K, batch, kv_head), kv_next, block);
        Floats sums[ROWS];
        UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
        multiply_add(sums, D, key[block], key.stride, 1, query_packed[0], LANES);
        UNROLL for (int r = 0; r < ROWS; ++r) {
          const int row = block + r;
          const int kv_idx = kv_start + row;
          const Floats score = sums[r];
          const auto visible = bit_of(seen, part) & ((kv_idx <= position) & (kv_idx < kv_len));
          const auto masked_score = where(visible, score, -INFINITY);
          store(masked_score_tile[row], masked_score);
          tile_max = max(tile_max, masked_score);
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
        const auto probs = exp(load(masked_score_tile[row]) - safe_row_max);
        store(masked_score_tile[row], probs);
        tile_sum = tile_sum + probs;
      }
      for (int block = 0; block < DV; block += ROWS) {
        fetch_share<DV, BLOCK_KV, DV>(matrix(V, batch, kv_head), kv_next, block);
        Floats sums[ROWS];
        UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
        multiply_add(sums, kv_rows, value[0] + block, 1, value.stride, masked_score_tile[0], LANES);
        UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = load(out_tile[block + r]) * rescale + sums[r];
        UNROLL for (int r = 0; r < ROWS; ++r) store(out_tile[block + r], sums[r]);
      }
      // softmax.py:30: new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
      const auto new_sum = row_sum * rescale + tile_sum;
      row_sum = new_sum;
    };
    for (int kv_start = max(kv_block * 64, kv_begin); kv_start < min(kv_block * 64 + 64, kv_end); kv_start += BLOCK_KV)
      partial_step(kv_start, kv_next);
  }

  // -- given kv blocks
  const auto full_step = [&](int kv_start, int kv_next) __attribute__((noinline)) {
    const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
    const Rows key = tile_of<D, false>(matrix(K, batch, kv_head), kv_start, kv_rows, key_spare);
    const Rows value = tile_of<DV, false>(matrix(V, batch, kv_head), kv_start, kv_rows, value_spare);
    Floats tile_max = fill(-INFINITY);
    for (int block = 0; block < kv_rows; block += ROWS) {
      fetch_share<D, BLOCK_KV, BLOCK_KV>(matrix(K, batch, kv_head), kv_next, block);
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, D, key[block], key.stride, 1, query_packed[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        const int row = block + r;
        const Floats score = sums[r];
        store(score_tile[row], score);
        tile_max = max(tile_max, score);
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
      const auto probs = exp(load(score_tile[row]) - safe_row_max);
      store(score_tile[row], probs);
      tile_sum = tile_sum + probs;
    }
    for (int block = 0; block < DV; block += ROWS) {
      fetch_share<DV, BLOCK_KV, DV>(matrix(V, batch, kv_head), kv_next, block);
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, kv_rows, value[0] + block, 1, value.stride, score_tile[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = load(out_tile[block + r]) * rescale + sums[r];
      UNROLL for (int r = 0; r < ROWS; ++r) store(out_tile[block + r], sums[r]);
    }
    // softmax.py:30: new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
    const auto new_sum = row_sum * rescale + tile_sum;
    row_sum = new_sum;
  };
  const auto partial_step = [&](int kv_start, int kv_next) __attribute__((noinline)) {
    const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
    const Rows key = tile_of<D, false>(matrix(K, batch, kv_head), kv_start, kv_rows, key_spare);
    const Rows value = tile_of<DV, false>(matrix(V, batch, kv_head), kv_start, kv_rows, value_spare);
    Floats tile_max = fill(-INFINITY);
    for (int block = 0; block < kv_rows; block += ROWS) {
      fetch_share<D, BLOCK_KV, BLOCK_KV>(matrix(K, batch, kv_head), kv_next, block);
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, D, key[block], key.stride, 1, query_packed[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        const int row = block + r;
        const int kv_idx = kv_start + row;
        const Floats score = sums[r];
        const auto visible = (kv_idx <= position) & (kv_idx < kv_len);
        const auto masked_score = where(visible, score, -INFINITY);
        store(masked_score_tile[row], masked_score);
        tile_max = max(tile_max, masked_score);
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
      const auto probs = exp(load(masked_score_tile[row]) - safe_row_max);
      store(masked_score_tile[row], probs);
      tile_sum = tile_sum + probs;
    }
    for (int block = 0; block < DV; block += ROWS) {
      fetch_share<DV, BLOCK_KV, DV>(matrix(V, batch, kv_head), kv_next, block);
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, kv_rows, value[0] + block, 1, value.stride, masked_score_tile[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = load(out_tile[block + r]) * rescale + sums[r];
      UNROLL for (int r = 0; r < ROWS; ++r) store(out_tile[block + r], sums[r]);
    }
    // softmax.py:30: new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
    const auto new_sum = row_sum * rescale + tile_sum;
    row_sum = new_sum;
  };
  for (int entry = full_begin; entry < full_end; ++entry) {
    const int kv_next = kv_full_blocks(min(entry + 1, full_end - 1)) * 64;
    const int kv_block = kv_full_blocks(entry);
    for (int kv_start = max(kv_block * 64, kv_begin); kv_start < min(kv_block * 64 + 64, kv_full_end); kv_start += BLOCK_KV)
      full_step(kv_start, kv_next);
    for (int kv_start = max(kv_block * 64, kv_full_end); kv_start < min(kv_block * 64 + 64, kv_end); kv_start += BLOCK_KV)
      partial_step(kv_start, kv_next);
  }

  // -- normalise and store
  // softmax.py:36: inverse_sum = torch.where(total > 0, 1.0 / total, 0.0)
  const auto inverse_sum = where(0.0f < row_sum, 1.0f / row_sum, 0.0f);
  write(saved_lse, q_rows, row_max + log(row_sum), batch, head, q_idx);
  write(saved_row_max, q_rows, row_max, batch, head, q_idx);
  write(saved_inverse_sum, q_rows, inverse_sum, batch, head, q_idx);
  for (int row = 0; row < DV; ++row) store(result_tile[row], load(out_tile[row]) * inverse_sum);
  unpack_lanes<DV>(matrix(O, batch, head), q_start, q_rows, result_tile);
}

// Any number of threads may run this on the same arguments; each takes the next task. Heavy tiles come first.
extern "C" void attn_engine_forward(Arguments* arguments) {
  const int64_t q_tiles = (arguments->q_len + BLOCK_Q - 1) / BLOCK_Q;
  const int64_t tasks = q_tiles * arguments->heads * arguments->batches;
  Scratch* scratch = (Scratch*)aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&arguments->next_task, 1, __ATOMIC_RELAXED);
    if (task >= tasks) break;
    tile_task(*arguments, *scratch, (q_tiles - 1 - task % q_tiles) * BLOCK_Q, task / q_tiles % arguments->heads, task / (q_tiles * arguments->heads));
  }
  free(scratch);
}

}  // namespace attention
