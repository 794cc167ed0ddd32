// Lists of the blocks that a call gives: entries are counted and put in their places, in one pass each.
//
// A list says which columns a row sees, ascending. `starts` has a place for each row of each list and one more:
// the columns of row r of list l are those from starts[l * (rows + 1) + r] on, up to that of r + 1.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace attention {

constexpr int WORD_BITS = 32;

/// The lists of a call: one for each batch and head that its tensors tell apart.
struct ListShape {
  int64_t batches, heads, rows, columns;
  int64_t strides[4];  // of the tensor that they are read from
  template <class T> const T* row(const T* data, int64_t list, int64_t row) const {
    return data + list / heads * strides[0] + list % heads * strides[1] + row * strides[2];
  }
  int64_t lists() const { return batches * heads; }
};

/// f(column) for every byte of a row that is not zero.
template <class F> inline void for_set_bytes(const uint8_t* row, int64_t columns, int64_t stride, F f) {
  int64_t c = 0;
  if (stride == 1)
    for (; c + 8 <= columns; c += 8) {
      uint64_t bytes;
      std::memcpy(&bytes, row + c, 8);
      for (; bytes; bytes &= bytes - 1) f(c + __builtin_ctzll(bytes) / 8);  // a bool is one bit of its byte
    }
  for (; c < columns; ++c)
    if (row[c * stride]) f(c);
}

/// The visible units of a mask; where `columns` is null they are counted alone. Returns how many.
inline int64_t units_of_mask(const uint8_t* mask, const ListShape& shape, int32_t* starts, int32_t* columns) {
  int64_t count = 0;
  for (int64_t list = 0; list < shape.lists(); ++list) {
    for (int64_t row = 0; row < shape.rows; ++row) {
      *starts++ = count;
      const uint8_t* bytes = shape.row(mask, list, row);
      if (columns) for_set_bytes(bytes, shape.columns, shape.strides[3], [&](int64_t c) { columns[count++] = c; });
      else for_set_bytes(bytes, shape.columns, shape.strides[3], [&](int64_t) { ++count; });
    }
    *starts++ = count;
  }
  return count;
}

/// The units that indices name, of `units` that there are; counts: how many of each row matter, null: all. largest: the
/// largest index that matters. Returns how many units there are.
template <class T>
inline int64_t units_of_indices(const T* indices, const ListShape& shape, const int64_t* counts, int64_t units,
                                int32_t* starts, int32_t* columns, int64_t* largest) {
  int64_t count = 0;
  *largest = -1;
  for (int64_t list = 0; list < shape.lists(); ++list) {
    for (int64_t row = 0; row < shape.rows; ++row) {
      *starts++ = count;
      const T* from = shape.row(indices, list, row);
      const int64_t most = counts ? *counts++ : shape.columns, first = count;
      bool ascending = true;
      for (int64_t i = 0; i < most; ++i) {
        const int64_t unit = from[i * shape.strides[3]];
        if (unit > *largest) *largest = unit;
        if (unit < 0 || unit >= units) continue;
        ascending = ascending && (count == first || columns[count - 1] < unit);
        columns[count++] = unit;
      }
      if (ascending) continue;
      std::sort(columns + first, columns + count);
      count = std::unique(columns + first, columns + count) - columns;
    }
    *starts++ = count;
  }
  return count;
}

/// How many entries there are where smallest, 2 * smallest, ... rows share a list.
inline void union_counts(const int32_t* starts, const int32_t* columns, const ListShape& shape, int64_t smallest,
                         int64_t sizes, int64_t* counts) {
  std::vector<int64_t> last(sizes * shape.columns, -1);  // the group of rows that saw a column last
  for (int64_t list = 0; list < shape.lists(); ++list, starts += shape.rows + 1)
    for (int64_t row = 0; row < shape.rows; ++row)
      for (int32_t entry = starts[row]; entry < starts[row + 1]; ++entry) {
        int64_t* mark = &last[columns[entry] * sizes];
        for (int64_t i = 0; i < sizes; ++i) {
          const int64_t group = list * shape.rows + row / (smallest << i);
          counts[i] += mark[i] != group, mark[i] = group;
        }
      }
}

struct Lists {
  int32_t *starts, *blocks;
  uint32_t* words;  // null: its entries have no bits
};

/// Blocks of q_units rows by kv_units columns. Entries of which some units alone are visible go to `partial`, with a bit
/// for each unit; units beyond the end count as visible.
inline void cut_units(const int32_t* starts, const int32_t* columns, const ListShape& shape, int64_t q_units,
                      int64_t kv_units, const Lists& partial, const Lists& full) {
  const int64_t bits = q_units * kv_units, words = (bits + WORD_BITS - 1) / WORD_BITS;
  const int64_t blocks = (shape.columns + kv_units - 1) / kv_units;
  std::vector<uint32_t> seen(blocks * words);
  std::vector<int64_t> last(blocks, -1);
  std::vector<int32_t> touched;
  int32_t partial_count = 0, full_count = 0, *partial_starts = partial.starts, *full_starts = full.starts;
  for (int64_t list = 0; list < shape.lists(); ++list, starts += shape.rows + 1) {
    for (int64_t first = 0; first < shape.rows; first += q_units) {
      *partial_starts++ = partial_count, *full_starts++ = full_count;
      const int64_t rows = std::min(q_units, shape.rows - first), here = list * shape.rows + first;
      const auto set = [&](int64_t block, int64_t bit) { seen[block * words + bit / WORD_BITS] |= 1u << bit % WORD_BITS; };
      touched.clear();
      for (int64_t row = 0; row < rows; ++row)
        for (int32_t entry = starts[first + row]; entry < starts[first + row + 1]; ++entry) {
          const int64_t block = columns[entry] / kv_units;
          if (last[block] != here) {
            last[block] = here;
            touched.push_back(block);
            std::fill_n(&seen[block * words], words, 0u);
          }
          set(block, row * kv_units + columns[entry] % kv_units);
        }
      std::sort(touched.begin(), touched.end());
      for (const int32_t block : touched) {
        const int64_t inside = std::min(kv_units, shape.columns - block * kv_units);
        if (rows < q_units || inside < kv_units)
          for (int64_t bit = 0; bit < bits; ++bit)
            if (bit / kv_units >= rows || bit % kv_units >= inside) set(block, bit);
        int64_t visible = 0;
        for (int64_t i = 0; i < words; ++i) visible += __builtin_popcount(seen[block * words + i]);
        if (visible == bits) {
          full.blocks[full_count++] = block;
        } else {
          std::copy_n(&seen[block * words], words, partial.words + partial_count * words);
          partial.blocks[partial_count++] = block;
        }
      }
    }
    *partial_starts++ = partial_count, *full_starts++ = full_count;
  }
}

/// The lists of the columns: which rows see each of them, ascending.
inline void turn_lists(const Lists& from, const ListShape& shape, int64_t words, const Lists& to) {
  std::vector<int32_t> place(shape.columns + 1);
  const int32_t* starts = from.starts;
  int32_t* to_starts = to.starts;
  for (int64_t list = 0; list < shape.lists(); ++list, starts += shape.rows + 1) {
    std::fill(place.begin(), place.end(), 0);
    for (int32_t entry = starts[0]; entry < starts[shape.rows]; ++entry) ++place[from.blocks[entry] + 1];
    place[0] = starts[0];
    for (int64_t c = 0; c < shape.columns; ++c) place[c + 1] += place[c];
    to_starts = std::copy(place.begin(), place.end(), to_starts);
    for (int64_t row = 0; row < shape.rows; ++row)
      for (int32_t entry = starts[row]; entry < starts[row + 1]; ++entry) {
        const int32_t at = place[from.blocks[entry]]++;
        to.blocks[at] = row;
        if (words) std::copy_n(from.words + entry * words, words, to.words + at * words);
      }
  }
}

}  // namespace attention

extern "C" int64_t attn_engine_units_of_mask(const uint8_t* mask, const attention::ListShape* shape, int32_t* starts,
                                             int32_t* columns) {
  return attention::units_of_mask(mask, *shape, starts, columns);
}

/// wide: whether the indices have 64 bits, else 32.
extern "C" int64_t attn_engine_units_of_indices(const void* indices, int64_t wide, const attention::ListShape* shape,
                                                const int64_t* counts, int64_t units, int32_t* starts,
                                                int32_t* columns, int64_t* largest) {
  using attention::units_of_indices;
  if (wide) return units_of_indices((const int64_t*)indices, *shape, counts, units, starts, columns, largest);
  return units_of_indices((const int32_t*)indices, *shape, counts, units, starts, columns, largest);
}

extern "C" void attn_engine_union_counts(const int32_t* starts, const int32_t* columns,
                                         const attention::ListShape* shape, int64_t smallest, int64_t sizes,
                                         int64_t* counts) {
  attention::union_counts(starts, columns, *shape, smallest, sizes, counts);
}

extern "C" void attn_engine_cut_units(const int32_t* starts, const int32_t* columns, const attention::ListShape* shape,
                                      int64_t q_units, int64_t kv_units, const attention::Lists* partial,
                                      const attention::Lists* full) {
  attention::cut_units(starts, columns, *shape, q_units, kv_units, *partial, *full);
}

extern "C" void attn_engine_turn_lists(const attention::Lists* from, const attention::ListShape* shape, int64_t words,
                                       const attention::Lists* to) {
  attention::turn_lists(*from, *shape, words, *to);
}
