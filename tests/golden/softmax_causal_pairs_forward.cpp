// attn_engine golden | causal_OnlineSoftmax: forward | cpu | block_q=64 block_kv=64
// regenerate: engine.source(backend="cpu", kernel="forward")
#define LANE_REGISTERS 4
#include "kernel.h"

namespace attention {

constexpr int BLOCK_Q = 64, BLOCK_KV = 64, D = 64, DV = 64;
static_assert(BLOCK_Q == LANES, "one query row per lane");

struct Arguments {  // 8 bytes each: the launcher fills them in this order
  int64_t next_task;  // shared by the threads
  Tensor<const BFloat16, 4> Q;
  Tensor<const BFloat16, 4> K;
  Tensor<const BFloat16, 4> V;
  Tensor<BFloat16, 4> O;
  Tensor<float, 3> saved_lse;
  Tensor<float, 3> saved_row_max;
  Tensor<float, 3> saved_inverse_sum;
  int64_t batches, heads, kv_heads, q_len, kv_len;
  double scale;
};
static_assert(sizeof(Arguments) == 8 * 64);

struct Scratch {  // of one thread
  alignas(64) Pair query_packed_pairs[round_up(D, 2) / 2][LANES];
  alignas(64) Real out_tile[round_up(DV, ROWS)][LANES];
  alignas(64) BFloat16 key_spare[BLOCK_KV][round_up(D, 2)];
  alignas(64) Pair value_pairs[round_up(BLOCK_KV, 2) / 2][round_up(DV, ROWS)];
  alignas(64) Real score_tile[BLOCK_KV][LANES];
  alignas(64) Pair probs_pairs[round_up(BLOCK_KV, 2) / 2][LANES];
  alignas(64) Real masked_score_tile[BLOCK_KV][LANES];
  alignas(64) Real result_tile[round_up(DV, ROWS)][LANES];
};

static void tile_task(const Arguments& arguments, Scratch& scratch, int q_start, int head, int batch) {
  const auto& Q = arguments.Q;
  const auto& K = arguments.K;
  const auto& V = arguments.V;
  const auto& O = arguments.O;
  const auto& saved_lse = arguments.saved_lse;
  const auto& saved_row_max = arguments.saved_row_max;
  const auto& saved_inverse_sum = arguments.saved_inverse_sum;
  const int heads = arguments.heads, kv_heads = arguments.kv_heads, q_len = arguments.q_len, kv_len = arguments.kv_len;
  const Real scale = arguments.scale;
  auto& query_packed_pairs = scratch.query_packed_pairs;
  auto& out_tile = scratch.out_tile;
  auto& key_spare = scratch.key_spare;
  auto& value_pairs = scratch.value_pairs;
  auto& score_tile = scratch.score_tile;
  auto& probs_pairs = scratch.probs_pairs;
  auto& masked_score_tile = scratch.masked_score_tile;
  auto& result_tile = scratch.result_tile;
  const int q_rows = min(BLOCK_Q, q_len - q_start);
  const Positions q_idx = positions(q_start);

  // -- query tile of this program
  const int kv_head = floor_div(head, floor_div(heads, kv_heads));
  pack_lane_pairs<D>(query_packed_pairs, matrix(Q, batch, head), q_start, q_rows);

  // -- row state of OnlineSoftmax
  for (int row = 0; row < DV; ++row) store(out_tile[row], fill(0.0f));
  Floats row_max = fill(-INFINITY);
  Floats row_sum = fill(0.0f);

  // -- kv tiles this tile can see
  const int q_last = min(q_start + 63, q_len - 1);
  const int kv_begin = 0;
  const int kv_end = max(floor_div(min(q_last + 1, kv_len) + 63, 64) * 64, kv_begin);
  const int kv_full_end = max(min(floor_div(min(q_start + 1, kv_len), 64) * 64, kv_end), kv_begin);

  // -- kv tiles seen in full: no mask
  const auto full_step = [&](int kv_start) __attribute__((noinline)) {
    const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
    const ElementRows key_rows = element_rows_of<D>(matrix(K, batch, kv_head), kv_start, kv_rows, key_spare);
    pack_row_pairs<DV>(value_pairs, matrix(V, batch, kv_head), kv_start, kv_rows);
    Floats tile_max = fill(-INFINITY);
    for (int block = 0; block < kv_rows; block += ROWS) {
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, D, key_rows[block], key_rows.stride, 2, query_packed_pairs[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        const int row = block + r;
        const Floats product = sums[r];
        const auto score = product * scale;
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
    for (int pair = 0; pair < kv_rows; pair += 2) {
      Floats even_probs;
      UNROLL for (int half = 0; half < 2; ++half) {
        const int row = pair + half;
        const auto probs = exp(load(score_tile[row]) - safe_row_max);
        store_pairs(probs_pairs[row / 2], half, even_probs, probs);
        tile_sum = tile_sum + probs;
      }
    }
    for (int block = 0; block < DV; block += ROWS) {
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, kv_rows, value_pairs[0] + block, 1, round_up(DV, ROWS), probs_pairs[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = load(out_tile[block + r]) * rescale + sums[r];
      UNROLL for (int r = 0; r < ROWS; ++r) store(out_tile[block + r], sums[r]);
    }
    // softmax.py:30: new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
    const auto new_sum = row_sum * rescale + tile_sum;
    row_sum = new_sum;
  };
  for (int kv_start = kv_begin; kv_start < kv_full_end; kv_start += BLOCK_KV)
    full_step(kv_start);

  // -- kv tiles seen in part: right edge
  const auto partial_step = [&](int kv_start) __attribute__((noinline)) {
    const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
    const ElementRows key_rows = element_rows_of<D>(matrix(K, batch, kv_head), kv_start, kv_rows, key_spare);
    pack_row_pairs<DV>(value_pairs, matrix(V, batch, kv_head), kv_start, kv_rows);
    Floats tile_max = fill(-INFINITY);
    for (int block = 0; block < kv_rows; block += ROWS) {
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, D, key_rows[block], key_rows.stride, 2, query_packed_pairs[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        const int row = block + r;
        const int kv_idx = kv_start + row;
        const Floats product = sums[r];
        const auto score = product * scale;
        const auto visible = (kv_idx <= q_idx) & (kv_idx < kv_len);
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
    for (int pair = 0; pair < kv_rows; pair += 2) {
      Floats even_probs;
      UNROLL for (int half = 0; half < 2; ++half) {
        const int row = pair + half;
        const auto probs = exp(load(masked_score_tile[row]) - safe_row_max);
        store_pairs(probs_pairs[row / 2], half, even_probs, probs);
        tile_sum = tile_sum + probs;
      }
    }
    for (int block = 0; block < DV; block += ROWS) {
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, kv_rows, value_pairs[0] + block, 1, round_up(DV, ROWS), probs_pairs[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = load(out_tile[block + r]) * rescale + sums[r];
      UNROLL for (int r = 0; r < ROWS; ++r) store(out_tile[block + r], sums[r]);
    }
    // softmax.py:30: new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
    const auto new_sum = row_sum * rescale + tile_sum;
    row_sum = new_sum;
  };
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
