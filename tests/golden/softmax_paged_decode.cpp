// attn_engine golden | causal_OnlineSoftmax: decode | cpu | block_q=1 block_kv=128
// regenerate: engine.source(backend="cpu", kernel="decode")
#define LANE_REGISTERS 2
#include "kernel.h"

namespace attention {

constexpr int BLOCK_Q = 1, BLOCK_KV = 128, D = 64, DV = 64;
static_assert(BLOCK_KV % LANES == 0, "whole vectors of keys");

struct Arguments {  // 8 bytes each: the launcher fills them in this order
  int64_t next_task;  // shared by the threads
  Tensor<const float, 4> Q;
  Tensor<const float, 4> K;
  Tensor<const float, 4> V;
  Tensor<const int32_t, 2> q_spans;
  Tensor<const int32_t, 2> kv_spans;
  Tensor<const int32_t, 1> tile_list;
  Tensor<const int32_t, 2> tile_ranges;
  Tensor<const int32_t, 2> block_table;
  Tensor<float, 5> partial_out;
  Tensor<float, 4> partial_row_max;
  Tensor<float, 4> partial_row_sum;
  int64_t batches, heads, kv_heads, q_len, kv_len;
  double scale;
  int64_t splits;
  int64_t tile_count;
};
static_assert(sizeof(Arguments) == 8 * 88);

struct Scratch {  // of one thread
  alignas(64) Real query_packed[BLOCK_Q][round_up(D, WIDTH)];
  alignas(64) Real out_tile[BLOCK_Q][round_up(DV, LANES)];
  alignas(64) Real row_max_tile[BLOCK_Q];
  alignas(64) Real row_sum_tile[BLOCK_Q];
  alignas(64) Real score_tile[BLOCK_Q][round_up(BLOCK_KV, LANES)];
  alignas(64) Real tile_max_tile[BLOCK_Q];
  alignas(64) Real rescale_tile[BLOCK_Q];
  alignas(64) Real tile_sum_tile[BLOCK_Q];
  alignas(64) Real probs_tile[BLOCK_Q][round_up(BLOCK_KV, LANES)];
};

static void tile_task(const Arguments& arguments, Scratch& scratch, int tile, int split) {
  const auto& q_spans = arguments.q_spans;
  const auto& kv_spans = arguments.kv_spans;
  const auto& tile_list = arguments.tile_list;
  const auto& tile_ranges = arguments.tile_ranges;
  const auto& block_table = arguments.block_table;
  const int heads = arguments.heads, kv_heads = arguments.kv_heads;
  const Real scale = arguments.scale;
  const int splits = arguments.splits;
  auto& query_packed = scratch.query_packed;
  auto& out_tile = scratch.out_tile;
  auto& row_max_tile = scratch.row_max_tile;
  auto& row_sum_tile = scratch.row_sum_tile;
  auto& score_tile = scratch.score_tile;
  auto& tile_max_tile = scratch.tile_max_tile;
  auto& rescale_tile = scratch.rescale_tile;
  auto& tile_sum_tile = scratch.tile_sum_tile;
  auto& probs_tile = scratch.probs_tile;

  // -- sequence of this program
  const int batch = tile_list(floor_div(tile, heads));
  const int place = tile - tile_ranges(batch, 0) * heads;
  const int tiles_of_head = tile_ranges(batch, 1);
  const int head = floor_div(place, tiles_of_head);
  const int tile_start = floor_mod(place, tiles_of_head) * 1;
  const int q_first = q_spans(batch, 0);
  const int q_len = q_spans(batch, 1);
  const int kv_len = kv_spans(batch, 1);
  const auto Q = rows_of<2>(arguments.Q, q_first, q_len);
  const auto partial_out = rows_of<3>(arguments.partial_out, q_first, q_len);
  const auto partial_row_max = rows_of<3>(arguments.partial_row_max, q_first, q_len);
  const auto partial_row_sum = rows_of<3>(arguments.partial_row_sum, q_first, q_len);
  const int q_start = tile_start;
  const int q_rows = min(BLOCK_Q, q_len - q_start);

  // -- query tile of this program
  const int kv_head = floor_div(head, floor_div(heads, kv_heads));
  pack_rows<D>(query_packed, matrix(Q, batch, head), q_start, q_rows, scale);

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
  const int q_last = min(q_start + 0, q_len - 1);
  const int kv_begin = 0;
  const int kv_end = max(floor_div(min(q_last + 1, kv_len) + 127, 128) * 128, kv_begin);
  const int kv_tiles = floor_div(kv_end - kv_begin, 128);
  const int tiles_per_split = floor_div(kv_tiles + splits - 1, splits);
  const int split_begin = kv_begin + split * tiles_per_split * 128;
  const int split_end = min(split_begin + tiles_per_split * 128, kv_end);
  const int kv_full_end = max(min(floor_div(min(q_start + 1, kv_len), 128) * 128, split_end), split_begin);

  // -- kv tiles seen in full: no mask
  const auto full_step = [&](int kv_start) __attribute__((noinline)) {
    const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
    const auto K = in_pages<16>(arguments.K, block_table, batch, kv_len);
    const auto V = in_pages<16>(arguments.V, block_table, batch, kv_len);
    const auto key = from_row(matrix(K, 0, kv_head), kv_start);
    const auto value = from_row(matrix(V, 0, kv_head), kv_start);
    inner_products<D>(score_tile, query_packed, key, kv_rows);
    for (int row = 0; row < BLOCK_Q; ++row) {
      Floats tile_max = fill(-INFINITY);
      for (int column = 0; column < kv_rows; column += LANES)
        tile_max = max(tile_max, load(score_tile[row] + column));
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
        const auto probs = exp(load(score_tile[row] + column) - safe_row_max);
        store(score_tile[row] + column, probs);
        tile_sum = tile_sum + probs;
      }
      tile_sum_tile[row] = sum_lanes(tile_sum);
    }
    for (int row = 0; row < BLOCK_Q; ++row) {
      for (int column = 0; column < DV; column += LANES)
        store(out_tile[row] + column, load(out_tile[row] + column) * rescale_tile[row]);
    }
    add_products<DV>(out_tile, score_tile, value, kv_rows);
    for (int row = 0; row < BLOCK_Q; ++row) {
      // softmax.py:30: new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
      const auto new_sum = row_sum_tile[row] * rescale_tile[row] + tile_sum_tile[row];
      row_sum_tile[row] = new_sum;
    }
  };
  for (int kv_start = split_begin; kv_start < kv_full_end; kv_start += BLOCK_KV)
    full_step(kv_start);

  // -- kv tiles seen in part: right edge
  const auto partial_step = [&](int kv_start) __attribute__((noinline)) {
    const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
    const auto K = in_pages<16>(arguments.K, block_table, batch, kv_len);
    const auto V = in_pages<16>(arguments.V, block_table, batch, kv_len);
    const auto key = from_row(matrix(K, 0, kv_head), kv_start);
    const auto value = from_row(matrix(V, 0, kv_head), kv_start);
    inner_products<D>(score_tile, query_packed, key, kv_rows);
    for (int row = 0; row < BLOCK_Q; ++row) {
      const int q_idx = q_start + row;
      Floats tile_max = fill(-INFINITY);
      for (int column = 0; column < kv_rows; column += LANES) {
        const Positions kv_idx = positions(kv_start + column);
        const auto visible = (kv_idx <= q_idx) & (kv_idx < kv_len);
        const auto masked_score = where(visible, load(score_tile[row] + column), -INFINITY);
        store(score_tile[row] + column, masked_score);
        tile_max = max(tile_max, masked_score);
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
        const auto probs = exp(load(score_tile[row] + column) - safe_row_max);
        store(probs_tile[row] + column, probs);
        tile_sum = tile_sum + probs;
      }
      tile_sum_tile[row] = sum_lanes(tile_sum);
    }
    for (int row = 0; row < BLOCK_Q; ++row) {
      for (int column = 0; column < DV; column += LANES)
        store(out_tile[row] + column, load(out_tile[row] + column) * rescale_tile[row]);
    }
    add_products<DV>(out_tile, probs_tile, value, kv_rows);
    for (int row = 0; row < BLOCK_Q; ++row) {
      // softmax.py:30: new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
      const auto new_sum = row_sum_tile[row] * rescale_tile[row] + tile_sum_tile[row];
      row_sum_tile[row] = new_sum;
    }
  };
  for (int kv_start = kv_full_end; kv_start < split_end; kv_start += BLOCK_KV)
    partial_step(kv_start);

  // -- store this split
  for (int row = 0; row < q_rows; ++row) {
    const int q_idx = q_start + row;
    write(partial_row_max, 1, row_max_tile[row], split, batch, head, q_idx);
    write(partial_row_sum, 1, row_sum_tile[row], split, batch, head, q_idx);
  }
  const auto partial_out_matrix = matrix(partial_out, split, batch, head);
  for (int row = 0; row < q_rows; ++row) {
    for (int column = 0; column < DV; column += LANES)
      write_row<DV>(partial_out_matrix, q_start + row, column, load(out_tile[row] + column));
  }
}

// Any number of threads may run this on the same arguments; each takes the next task.
extern "C" void attn_engine_decode(Arguments* arguments) {
  const int64_t tasks = arguments->tile_count * arguments->splits;
  Scratch* scratch = (Scratch*)aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&arguments->next_task, 1, __ATOMIC_RELAXED);
    if (task >= tasks) break;
    tile_task(*arguments, *scratch, task % arguments->tile_count, task / arguments->tile_count);
  }
  free(scratch);
}

}  // namespace attention
