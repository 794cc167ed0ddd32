// attn_engine golden | mask_mod_OnlineRetention: forward | cpu | block_q=64 block_kv=64
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
  Tensor<const int32_t, 1> documents;
  Tensor<const int64_t, 2> q_documents_range;
  Tensor<const int64_t, 2> kv_documents_range;
  Tensor<float, 4> O;
  Tensor<float, 3> saved_abs_sum;
  int64_t batches, heads, kv_heads, q_len, kv_len;
  double scale;
};
static_assert(sizeof(Arguments) == 8 * 63);

struct Scratch {  // of one thread
  alignas(64) Real query_packed[D][LANES];
  alignas(64) Real out_tile[round_up(DV, ROWS)][LANES];
  alignas(64) Real key_spare[BLOCK_KV][D];
  alignas(64) Real value_spare[BLOCK_KV][round_up(DV, ROWS)];
  alignas(64) Real score_tile[BLOCK_KV][LANES];
  alignas(64) Real probs_tile[BLOCK_KV][LANES];
  alignas(64) Real result_tile[round_up(DV, ROWS)][LANES];
};

static void tile_task(const Arguments& arguments, Scratch& scratch, int q_start, int head, int batch) {
  const auto& Q = arguments.Q;
  const auto& K = arguments.K;
  const auto& V = arguments.V;
  const auto& documents = arguments.documents;
  const auto& q_documents_range = arguments.q_documents_range;
  const auto& kv_documents_range = arguments.kv_documents_range;
  const auto& O = arguments.O;
  const auto& saved_abs_sum = arguments.saved_abs_sum;
  const int heads = arguments.heads, kv_heads = arguments.kv_heads, q_len = arguments.q_len, kv_len = arguments.kv_len;
  const Real scale = arguments.scale;
  auto& query_packed = scratch.query_packed;
  auto& out_tile = scratch.out_tile;
  auto& key_spare = scratch.key_spare;
  auto& value_spare = scratch.value_spare;
  auto& score_tile = scratch.score_tile;
  auto& probs_tile = scratch.probs_tile;
  auto& result_tile = scratch.result_tile;
  const int q_rows = min(BLOCK_Q, q_len - q_start);
  const Positions q_idx = positions(q_start);

  // -- query tile of this program
  const int kv_head = floor_div(head, floor_div(heads, kv_heads));
  pack_lanes<D>(query_packed, matrix(Q, batch, head), q_start, q_rows, scale);
  const auto documents_row = documents(q_idx);

  // -- row state of OnlineRetention
  for (int row = 0; row < DV; ++row) store(out_tile[row], fill(0.0f));
  Floats row_abs_sum = fill(0.0f);

  // -- kv tiles this tile can see
  const int q_last = min(q_start + 63, q_len - 1);
  const int q_documents_min = q_documents_range(floor_div(q_start, 64), 0);
  const int q_documents_max = q_documents_range(floor_div(q_start, 64), 1);
  const int kv_begin = 0;
  const int kv_end = max(floor_div(min(q_last + 1, kv_len) + 63, 64) * 64, kv_begin);

  // -- kv tiles in sight: none, some or all of the pairs visible
  const auto full_step = [&](int kv_start) __attribute__((noinline)) {
    const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
    const Rows key = tile_of<D>(matrix(K, batch, kv_head), kv_start, kv_rows, key_spare);
    const Rows value = tile_of<DV>(matrix(V, batch, kv_head), kv_start, kv_rows, value_spare);
    Floats tile_sum = fill(0);
    for (int block = 0; block < kv_rows; block += ROWS) {
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, D, key[block], key.stride, 1, query_packed[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        const int row = block + r;
        const Floats score = sums[r];
        store(score_tile[row], score);
        tile_sum = tile_sum + abs(score);
      }
    }
    for (int block = 0; block < DV; block += ROWS) {
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, kv_rows, value[0] + block, 1, value.stride, score_tile[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = load(out_tile[block + r]) + sums[r];
      UNROLL for (int r = 0; r < ROWS; ++r) store(out_tile[block + r], sums[r]);
    }
    // retention.py:24: new_sum = online_rowscales["row_abs_sum"] + scores.get_reduce("abssum")
    const auto new_sum = row_abs_sum + tile_sum;
    row_abs_sum = new_sum;
  };
  const auto partial_step = [&](int kv_start) __attribute__((noinline)) {
    const int kv_rows = min(BLOCK_KV, kv_len - kv_start);
    const Rows key = tile_of<D>(matrix(K, batch, kv_head), kv_start, kv_rows, key_spare);
    const Rows value = tile_of<DV>(matrix(V, batch, kv_head), kv_start, kv_rows, value_spare);
    Floats tile_sum = fill(0);
    for (int block = 0; block < kv_rows; block += ROWS) {
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, D, key[block], key.stride, 1, query_packed[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        const int row = block + r;
        const int kv_idx = kv_start + row;
        const Floats score = sums[r];
        // test_golden.py:53: same_document = documents[q_idx] == documents[kv_idx]
        const auto same_document = documents_row == documents(kv_idx);
        const auto visible = same_document & (kv_idx <= q_idx) & (kv_idx < kv_len);
        const auto probs = where(visible, score, 0.0f);
        store(probs_tile[row], probs);
        tile_sum = tile_sum + where(visible, abs(probs), 0.0f);
      }
    }
    for (int block = 0; block < DV; block += ROWS) {
      Floats sums[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
      multiply_add(sums, kv_rows, value[0] + block, 1, value.stride, probs_tile[0], LANES);
      UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = load(out_tile[block + r]) + sums[r];
      UNROLL for (int r = 0; r < ROWS; ++r) store(out_tile[block + r], sums[r]);
    }
    // retention.py:24: new_sum = online_rowscales["row_abs_sum"] + scores.get_reduce("abssum")
    const auto new_sum = row_abs_sum + tile_sum;
    row_abs_sum = new_sum;
  };
  for (int kv_start = kv_begin; kv_start < kv_end; kv_start += BLOCK_KV) {
    const int kv_last = min(kv_start + 63, kv_len - 1);
    const int kv_documents_min = kv_documents_range(floor_div(kv_start, 64), 0);
    const int kv_documents_max = kv_documents_range(floor_div(kv_start, 64), 1);
    if ((q_documents_min <= kv_documents_max) && (kv_documents_min <= q_documents_max)) {
      const bool tile_is_whole = (q_documents_max <= kv_documents_min) && (kv_documents_max <= q_documents_min) && (kv_last <= q_start) && (kv_start + 64 <= kv_len);
      if (tile_is_whole) full_step(kv_start);
      if (!tile_is_whole) partial_step(kv_start);
    }
  }

  // -- normalise and store
  for (int row = 0; row < DV; ++row) store(result_tile[row], load(out_tile[row]) / where(row_abs_sum < 1.0f, 1.0f, row_abs_sum));
  unpack_lanes<DV>(matrix(O, batch, head), q_start, q_rows, result_tile);
  write(saved_abs_sum, q_rows, row_abs_sum, batch, head, q_idx);
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
