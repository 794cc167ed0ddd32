// How tensors lie in memory: strided tensors, read and written at indices that are numbers or lanes. Neighbouring lanes
// that index neighbouring elements are moved by whole vectors, also where they read them backwards; others are gathered.
#pragma once
#include "elements.h"

namespace attention {

template <class T, int RANK> struct Tensor {
  T* data;
  int64_t sizes[RANK > 0 ? RANK : 1], strides[RANK > 0 ? RANK : 1];  // strides in elements

  /// The element at `index`: a number when every index is one, lanes when some index has lanes. An index outside is
  /// taken to the nearest edge.
  template <class... Index> inline __attribute__((always_inline)) auto operator()(Index... index) const;
};

/// Rows first, ..., first + count - 1 along one dimension, as a tensor of their own.
template <int DIMENSION, class T, int RANK> INLINE Tensor<T, RANK> rows_of(Tensor<T, RANK> x, int64_t first, int64_t count) {
  x.data += first * x.strides[DIMENSION];
  x.sizes[DIMENSION] = count;
  return x;
}

INLINE int64_t inside(int64_t index, int64_t size) { return index < 0 || size == 0 ? 0 : index < size ? index : size - 1; }
INLINE Ints inside(Ints index, int64_t size) {
  constexpr int64_t LARGEST = (int64_t)(~(uint64_t)0 >> (65 - 8 * sizeof(Int)));
  const Int last = size - 1 < LARGEST ? (size > 0 ? size - 1 : 0) : LARGEST;
  return each<Ints>([&](int p) {
    const IntVector x = index.part[p] > last ? last - IntVector{} : index.part[p];
    return x < 0 ? IntVector{} : x;
  });
}

// -- where the lanes' elements lie

template <class T> struct Places {
  T* shared;      // what the plain indices lead to
  int64_t first;  // offset of the first lane where the lanes are neighbours: one index has lanes, at stride 1
  bool neighbours;
  bool backwards;  // the same, but `first` is that of the last lane: distances from a key fall along its vector
  bool narrow;  // the lanes' offsets fit an Int
  Ints lane;    // each lane's offset from `shared`; only where narrow
};

/// Adds one dimension to places; `count` lanes matter.
template <class T, class I>
INLINE void add_index(Places<T>& places, int64_t& reach, bool alone, int count, I index, int64_t size, int64_t stride) {
  if constexpr (WIDE<I>) {
    if constexpr (IN_A_ROW<I>) {
      const auto x = bounded(index);
      constexpr bool RISING = std::is_same_v<decltype(x), const Bounded<Positions>>;
      places.first = lowest(x);
      const int last = RISING ? x.first + count - 1 : x.first;
      const bool in_a_row = alone && stride == 1 && !x.met && places.first >= 0 && last < size;
      (RISING ? places.neighbours : places.backwards) = in_a_row;
    }
    reach += (size > 0 ? size - 1 : 0) * stride;
    const Ints x = inside(index, size);
    const Int step = size > 1 ? stride : 0;
    places.lane = each<Ints>([&](int p) { return (IntVector)(places.lane.part[p] + x.part[p] * step); });
  } else {
    places.shared += inside(index, size) * stride;
  }
}

template <class T, int RANK, class... Index>
INLINE Places<T> places_in(const Tensor<T, RANK>& tensor, int count, Index... index) {
  static_assert(sizeof...(Index) == RANK, "one index per dimension");
  Places<T> places = {tensor.data, 0, false, false, true, {}};
  constexpr bool ALONE = (WIDE<Index> + ... + 0) == 1;
  int64_t reach = 0;
  int i = 0;
  ((add_index(places, reach, ALONE, count, index, tensor.sizes[i], tensor.strides[i]), ++i), ...);
  places.narrow = reach < 0x20000000;  // times four bytes it is still an Int
  return places;
}

/// The offset of one lane from `shared`, for tensors too large for `Places::lane`.
template <class I> INLINE int64_t lane_offset(I index, int lane, int64_t size, int64_t stride) {
  if constexpr (WIDE<I>) return inside((int64_t)index.part[lane / WIDTH][lane % WIDTH], size) * stride;
  else return 0;
}

/// f(lane, element) for the first `count` lanes, one after the other. Not inlined: it is long, and the unrolled rows of a
/// kernel would each repeat it.
template <class T, int RANK, class F, class... Index>
OUTLINE void for_lanes(const Tensor<T, RANK>& tensor, const Places<T>& places, int count, F f, Index... index) {
  if (places.narrow) {
    Int offsets[LANES];
    UNROLL for (int p = 0; p < PARTS; ++p) *(IntVector*)(offsets + p * WIDTH) = places.lane.part[p];
    for (int lane = 0; lane < count; ++lane) f(lane, places.shared[offsets[lane]]);
  } else {
    for (int lane = 0; lane < count; ++lane) {
      int64_t offset = 0;
      int i = 0;
      ((offset += lane_offset(index, lane, tensor.sizes[i], tensor.strides[i]), ++i), ...);
      f(lane, places.shared[offset]);
    }
  }
}

// -- reading

#if defined(__AVX2__) && !defined(COMPUTE_IN_DOUBLE)
#define GATHERS 1
INLINE IntVector gather_words(const void* words, IntVector index) {
#if defined(__AVX512F__)
  // Tables by distance end somewhere: all lanes beyond meet in one element.
  const __m512i first = _mm512_broadcastd_epi32(_mm512_castsi512_si128((__m512i)index));
  if (!_mm512_cmpneq_epi32_mask((__m512i)index, first)) {
    int word;
    __builtin_memcpy(&word, (const char*)words + (int64_t)index[0] * 4, 4);
    return word - IntVector{};
  }
  return (IntVector)_mm512_i32gather_epi32((__m512i)index, (const int*)words, 4);
#else
  return (IntVector)_mm256_i32gather_epi32((const int*)words, (__m256i)index, 4);
#endif
}

/// Elements of up to four bytes, each in its lane. Smaller ones are cut out of the aligned word around them, which never
/// reaches into a page that the element does not lie in.
template <class T> INLINE VectorOf<T> gather_vector(const T* x, IntVector index) {
  if constexpr (sizeof(T) == 4) {
    return (VectorOf<T>)gather_words(x, index);
  } else {
    const int skipped = (uintptr_t)x & 3;
    const IntVector byte = index * (int)sizeof(T) + skipped;
    const IntVector word = gather_words((const char*)x - skipped, byte >> 2);
    const IntVector bits = word >> ((byte & 3) << 3) & (IntVector{} + ((1 << 8 * sizeof(T)) - 1));
    if constexpr (std::is_same_v<T, BFloat16>) return bfloat16_values(bits);
    else if constexpr (std::is_same_v<T, Half>) return half_values(bits);
    else if constexpr (std::is_same_v<T, bool>) return -bits;
    else if constexpr (std::is_signed_v<T>) return bits << (32 - 8 * sizeof(T)) >> (32 - 8 * sizeof(T));
    else return bits;
  }
}
#else
#define GATHERS 0
#endif

template <class T, int RANK> template <class... Index> auto Tensor<T, RANK>::operator()(Index... index) const {
  using Element = std::remove_const_t<T>;
  using Value = decltype(value_of(*data));
  const Places<T> places = places_in(*this, LANES, index...);
  if constexpr ((WIDE<Index> || ...)) {
    using Result = std::conditional_t<KIND<Value> == 2, Floats, std::conditional_t<KIND<Value> == 1, Ints, Mask>>;
    if (places.neighbours)
      return each<Result>([&](int p) { return load_vector<Element>(places.shared + places.first + p * WIDTH); });
    if (places.backwards)
      return each<Result>([&](int p) {
        return turned(load_vector<Element>(places.shared + places.first + (PARTS - 1 - p) * WIDTH));
      });
#if GATHERS
    if constexpr (sizeof(T) <= 4)
      if (places.narrow) return each<Result>([&](int p) { return gather_vector<Element>(places.shared, places.lane.part[p]); });
#endif
    Result result;
    for_lanes(*this, places, LANES, [&](int lane, T& element) {
      const auto value = value_of(element);
      if constexpr (std::is_same_v<Result, Mask>) result.part[lane / WIDTH][lane % WIDTH] = -(Int)value;
      else result.part[lane / WIDTH][lane % WIDTH] = value;
    }, index...);
    return result;
  } else {
    return value_of(*places.shared);
  }
}

// -- writing

/// tensor[index] = value in the first `count` lanes.
template <class T, int RANK, class... Index>
INLINE void write(const Tensor<T, RANK>& tensor, int count, Floats value, Index... index) {
  const Places<T> places = places_in(tensor, count, index...);
  if (places.neighbours) {
    UNROLL for (int p = 0; p < PARTS; ++p)
      store_vector(places.shared + places.first + p * WIDTH, value.part[p], count - p * WIDTH);
  } else {
    for_lanes(tensor, places, count, [&](int lane, T& element) {
      element = element_of<T>(value.part[lane / WIDTH][lane % WIDTH]);
    }, index...);
  }
}
template <class T, int RANK, class... Index>
INLINE void write(const Tensor<T, RANK>& tensor, int, Real value, Index... index) {
  *places_in(tensor, 1, index...).shared = element_of<T>(value);
}

/// tensor[index] += value in the first `count` lanes, one after the other: lanes may meet in one element.
template <class T, int RANK, class... Index>
INLINE void add(const Tensor<T, RANK>& tensor, int count, Floats value, Index... index) {
  const Places<T> places = places_in(tensor, count, index...);
  if (places.neighbours && count == LANES) {
    UNROLL for (int p = 0; p < PARTS; ++p) {
      T* to = places.shared + places.first + p * WIDTH;
      store_vector(to, load_vector<T>(to) + value.part[p], WIDTH);
    }
  } else {
    for_lanes(tensor, places, count, [&](int lane, T& element) {
      element = element_of<T>(value_of(element) + value.part[lane / WIDTH][lane % WIDTH]);
    }, index...);
  }
}
template <class T, int RANK, class... Index>
INLINE void add(const Tensor<T, RANK>& tensor, int, Real value, Index... index) {
  T& element = *places_in(tensor, 1, index...).shared;
  element = element_of<T>(value_of(element) + value);
}

}  // namespace attention
