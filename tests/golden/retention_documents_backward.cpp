// attn_engine golden | mask_mod_OnlineRetention: backward | cpu | block_q=64 block_kv=64
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
  Tensor<const float, 3> saved_abs_sum;
  Tensor<const float, 3> Delta;
  Tensor<const int32_t, 1> documents;
  Tensor<const int64_t, 2> q_documents_range;
  Tensor<const int64_t, 2> kv_documents_range;
  Tensor<float, 4> dK;
  Tensor<float, 4> dV;
  Tensor<float, 5> dQ_parts;
  int64_t batches, heads, kv_heads, q_len, kv_len;
  double scale;
  int64_t splits;
};
static_assert(sizeof(Arguments) == 8 * 100);

struct Scratch {  // of one thread
  alignas(64) Real d_value_tile[round_up(DV, ROWS)][LANES];
  alignas(64) Real d_key_tile[round_up(D, ROWS)][LANES];
  alignas(64) Real key_packed[D][LANES];
  alignas(64) Real key_spare[BLOCK_KV][round_up(D, LANES)];
  alignas(64) Real value_packed[DV][LANES];
  alignas(64) Real abs_sum_tile[BLOCK_Q];
  alignas(64) Real delta_tile[BLOCK_Q];
  alignas(64) Real query_spare[BLOCK_Q][round_up(D, ROWS)];
  alignas(64) Real d_out_spare[BLOCK_Q][round_up(DV, ROWS)];
  alignas(64) Real d_probs_tile[BLOCK_Q][LANES];
  alignas(64) Real probs_tile[BLOCK_Q][LANES];
  alignas(64) Real result_tile[round_up(D, ROWS)][LANES];
};

static void tile_task(const Arguments& arguments, Scratch& scratch, int split, int kv_head, int batch) {
  const auto& Q = arguments.Q;
  const auto& K = arguments.K;
  const auto& V = arguments.V;
  const auto& dO = arguments.dO;
  const auto& saved_abs_sum = arguments.saved_abs_sum;
  const auto& Delta = arguments.Delta;
  const auto& documents = arguments.documents;
  const auto& q_documents_range = arguments.q_documents_range;
  const auto& kv_documents_range = arguments.kv_documents_range;
  const auto& dK = arguments.dK;
  const auto& dV = arguments.dV;
  const auto& dQ_parts = arguments.dQ_parts;
  const int heads = arguments.heads, kv_heads = arguments.kv_heads, q_len = arguments.q_len, kv_len = arguments.kv_len;
  const Real scale = arguments.scale;
  const int splits = arguments.splits;
  auto& d_value_tile = scratch.d_value_tile;
  auto& d_key_tile = scratch.d_key_tile;
  auto& key_packed = scratch.key_packed;
  auto& key_spare = scratch.key_spare;
  auto& value_packed = scratch.value_packed;
  auto& abs_sum_tile = scratch.abs_sum_tile;
  auto& delta_tile = scratch.delta_tile;
  auto& query_spare = scratch.query_spare;
  auto& d_out_spare = scratch.d_out_spare;
  auto& d_probs_tile = scratch.d_probs_tile;
  auto& probs_tile = scratch.probs_tile;
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
      const auto documents_row = documents(kv_idx);
      const int kv_last = min(kv_start + 63, kv_len - 1);
      const int kv_documents_min = kv_documents_range(floor_div(kv_start, 64), 0);
      const int kv_documents_max = kv_documents_range(floor_div(kv_start, 64), 1);
      const int q_begin = max(floor_div(kv_start, 64) * 64, 0);
      const int q_end = max(floor_div(q_len + 63, 64) * 64, q_begin);

      // -- q tiles in sight: none, some or all of the pairs visible
      const auto full_step = [&](int q_start) __attribute__((noinline)) {
        const int q_rows = min(BLOCK_Q, q_len - q_start);
        for (int row = 0; row < q_rows; ++row) {
          const int q_idx = q_start + row;
          abs_sum_tile[row] = saved_abs_sum(batch, head, q_idx);
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
        for (int block = 0; block < q_rows; block += ROWS) {
          Floats sums[ROWS];
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
          multiply_add(sums, D, query[block], query.stride, 1, key_packed[0], LANES);
          UNROLL for (int r = 0; r < ROWS; ++r) {
            const int row = block + r;
            const Floats score = sums[r];
            const auto probs = score / where(abs_sum_tile[row] < 1.0f, 1.0f, abs_sum_tile[row]);
            store(probs_tile[row], probs);
            // retention.py:41: through_sum = torch.where(total > 1, doosum * torch.sign(scores), 0.0)
            const auto through_sum = where(1.0f < abs_sum_tile[row], delta_tile[row] * (to_float(0.0f < probs) - to_float(probs < 0.0f)), 0.0f);
            store(d_probs_tile[row], (load(d_probs_tile[row]) - through_sum) / where(abs_sum_tile[row] < 1.0f, 1.0f, abs_sum_tile[row]));
          }
        }
        const auto dQ_parts_matrix = matrix(dQ_parts, split, batch, head);
        for (int column = 0; column < D; column += LANES) {
          for (int block = 0; block < q_rows; block += ROWS) {
            Floats sums[ROWS];
            UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
            multiply_add(sums, kv_rows, d_probs_tile[block], LANES, 1, key[0] + column, key.stride);
            UNROLL for (int r = 0; r < ROWS; ++r) {
              const int row = block + r;
              const Floats dQ_parts_tile = sums[r];
              if (row < q_rows) add_row<D>(dQ_parts_matrix, q_start + row, column, dQ_parts_tile);
            }
          }
        }
        for (int block = 0; block < D; block += ROWS) {
          Floats sums[ROWS];
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
          multiply_add(sums, q_rows, query[0] + block, 1, query.stride, d_probs_tile[0], LANES);
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
      const auto partial_step = [&](int q_start) __attribute__((noinline)) {
        const int q_rows = min(BLOCK_Q, q_len - q_start);
        for (int row = 0; row < q_rows; ++row) {
          const int q_idx = q_start + row;
          abs_sum_tile[row] = saved_abs_sum(batch, head, q_idx);
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
        for (int block = 0; block < q_rows; block += ROWS) {
          Floats sums[ROWS];
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
          multiply_add(sums, D, query[block], query.stride, 1, key_packed[0], LANES);
          UNROLL for (int r = 0; r < ROWS; ++r) {
            const int row = block + r;
            const int q_idx = q_start + row;
            const Floats score = sums[r];
            // test_golden.py:53: same_document = documents[q_idx] == documents[kv_idx]
            const auto same_document = documents(q_idx) == documents_row;
            const auto visible = same_document & (kv_idx <= q_idx) & ((q_idx < q_len) & (kv_idx < kv_len));
            const auto probs = where(visible, score / where(abs_sum_tile[row] < 1.0f, 1.0f, abs_sum_tile[row]), 0.0f);
            store(probs_tile[row], probs);
            // retention.py:41: through_sum = torch.where(total > 1, doosum * torch.sign(scores), 0.0)
            const auto through_sum = where(1.0f < abs_sum_tile[row], delta_tile[row] * (to_float(0.0f < probs) - to_float(probs < 0.0f)), 0.0f);
            store(d_probs_tile[row], where(visible, (load(d_probs_tile[row]) - through_sum) / where(abs_sum_tile[row] < 1.0f, 1.0f, abs_sum_tile[row]), 0.0f));
          }
        }
        const auto dQ_parts_matrix = matrix(dQ_parts, split, batch, head);
        for (int column = 0; column < D; column += LANES) {
          for (int block = 0; block < q_rows; block += ROWS) {
            Floats sums[ROWS];
            UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
            multiply_add(sums, kv_rows, d_probs_tile[block], LANES, 1, key[0] + column, key.stride);
            UNROLL for (int r = 0; r < ROWS; ++r) {
              const int row = block + r;
              const Floats dQ_parts_tile = sums[r];
              if (row < q_rows) add_row<D>(dQ_parts_matrix, q_start + row, column, dQ_parts_tile);
            }
          }
        }
        for (int block = 0; block < D; block += ROWS) {
          Floats sums[ROWS];
          UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill(0.0f);
          multiply_add(sums, q_rows, query[0] + block, 1, query.stride, d_probs_tile[0], LANES);
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
      for (int q_start = q_begin; q_start < q_end; q_start += BLOCK_Q) {
        const int q_documents_min = q_documents_range(floor_div(q_start, 64), 0);
        const int q_documents_max = q_documents_range(floor_div(q_start, 64), 1);
        if ((q_documents_min <= kv_documents_max) && (kv_documents_min <= q_documents_max)) {
          const bool tile_is_whole = (q_documents_max <= kv_documents_min) && (kv_documents_max <= q_documents_min) && (kv_last <= q_start) && (q_start + 64 <= q_len) && (kv_start + 64 <= kv_len);
          if (tile_is_whole) full_step(q_start);
          if (!tile_is_whole) partial_step(q_start);
        }
      }
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
