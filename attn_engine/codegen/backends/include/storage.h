// How tensors lie in memory: element types, strided tensors, and reading and writing them by numbers or by lanes.
#pragma once
#include "functions.h"

namespace attention {

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

// -- one element to and from its compute type

template <class T> INLINE auto value_of(T x) {
  if constexpr (std::is_same_v<T, bool>) return x;
  else if constexpr (std::is_integral_v<T>) return (int)x;
  else return (Real)x;
}
INLINE float bits_as_float(uint32_t bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
INLINE uint32_t float_as_bits(float x) { uint32_t bits; __builtin_memcpy(&bits, &x, 4); return bits; }
INLINE Real value_of(BFloat16 x) { return bits_as_float((uint32_t)x.bits << 16); }
INLINE Real value_of(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  const float magnitude = bits_as_float(rest << 13) * 0x1p112f;  // moves the exponent's bias; exact, also for subnormals
  return bits_as_float(sign | float_as_bits(magnitude));
#endif
}

template <class T> INLINE T element_of(Real x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = float_as_bits((float)x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
    return {(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__F16C__)
    return {(uint16_t)_cvtss_sh((float)x, 0)};
#else
    const uint32_t bits = float_as_bits((float)x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return {(uint16_t)(sign | 0x7e00u)};
    if (rest >= 0x477ff000u) return {(uint16_t)(sign | 0x7c00u)};
    if (rest < 0x38800000u) {  // subnormal: let the addition round to a multiple of 2^-24
      return {(uint16_t)(sign | (float_as_bits(bits_as_float(rest) + 0.5f) - float_as_bits(0.5f)))};
    }
    return {(uint16_t)(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13))};
#endif
  } else {
    return (T)x;
  }
}

// -- WIDTH neighbouring elements at once

template <class T> INLINE FloatVector load_vector(const T* x) {
  if constexpr (std::is_same_v<T, Real>) {
    return *(const FloatVector*)x;
#if !defined(COMPUTE_IN_DOUBLE)
#if defined(__AVX512F__)  // the compiler's own conversion takes three times as many instructions
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return (FloatVector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16);
#elif defined(__AVX2__)
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return (FloatVector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16);
#endif
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    typedef uint16_t Packed __attribute__((vector_size(WIDTH * 2), aligned(2), may_alias));
    return (FloatVector)(__builtin_convertvector(*(const Packed*)x, IntVector) << 16);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, Half>) {
    return (FloatVector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
#elif defined(__AVX2__) && defined(__F16C__)
  } else if constexpr (std::is_same_v<T, Half>) {
    return (FloatVector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
#endif
#endif
  } else {
    FloatVector v;
    for (int i = 0; i < WIDTH; ++i) v[i] = (Real)value_of(x[i]);
    return v;
  }
}

/// The first `count` of WIDTH elements. Copied from a local array: a compiler may turn a loop of conditional stores into
/// a masked instruction that still faults on the memory it does not write.
template <class T> INLINE void store_vector(T* to, FloatVector v, int count) {
  if (std::is_same_v<T, Real> && count >= WIDTH) {
    *(FloatVector*)to = v;
  } else if (count > 0) {
    T elements[WIDTH];
    for (int i = 0; i < WIDTH; ++i) elements[i] = element_of<T>(v[i]);
    __builtin_memcpy((void*)to, elements, (count < WIDTH ? count : WIDTH) * sizeof(T));
  }
}

// -- tensors indexed by numbers and lanes; an index outside is taken to the nearest edge

template <class T, int RANK> struct Tensor {
  T* data;
  int64_t sizes[RANK > 0 ? RANK : 1], strides[RANK > 0 ? RANK : 1];  // strides in elements

  /// The element at `index`: a number when every index is one, lanes when some index has lanes.
  template <class... Index> inline __attribute__((always_inline)) auto operator()(Index... index) const;
};

struct Offsets {  // of each lane's element, or of the one element
  int64_t shared = 0;
  int64_t lane[LANES] = {};
};

INLINE int64_t inside(int64_t index, int64_t size) { return index < 0 || size == 0 ? 0 : index < size ? index : size - 1; }

template <class I> INLINE void add_index(Offsets& offsets, I index, int64_t size, int64_t stride) {
  if constexpr (WIDE<I>) {
    for (int i = 0; i < LANES; ++i) offsets.lane[i] += inside(index.part[i / WIDTH][i % WIDTH], size) * stride;
  } else {
    offsets.shared += inside(index, size) * stride;
  }
}

template <class T, int RANK, class... Index> INLINE Offsets offsets_in(const Tensor<T, RANK>& tensor, Index... index) {
  static_assert(sizeof...(Index) == RANK, "one index per dimension");
  Offsets offsets;
  int i = 0;
  ((add_index(offsets, index, tensor.sizes[i], tensor.strides[i]), ++i), ...);
  return offsets;
}

template <class Result, class T> INLINE Result gather(const T* data, const Offsets& offsets) {
  Result result;
  for (int i = 0; i < LANES; ++i) {
    const auto value = value_of(data[offsets.shared + offsets.lane[i]]);
    if constexpr (std::is_same_v<Result, Mask>) result.part[i / WIDTH][i % WIDTH] = -(Int)value;
    else result.part[i / WIDTH][i % WIDTH] = value;
  }
  return result;
}

/// LANES elements that lie side by side.
template <class Result, class T> INLINE Result load_neighbours(const T* data) {
  if constexpr (std::is_same_v<Result, Floats>) return each<Floats>([&](int p) { return load_vector(data + p * WIDTH); });
  else return gather<Result>(data, [] { Offsets o; for (int i = 0; i < LANES; ++i) o.lane[i] = i; return o; }());
}

/// Where neighbouring lanes read neighbouring elements, the first of them: adds one index, says whether it fits.
template <class I> INLINE bool add_start(int64_t& start, I index, int64_t size, int64_t stride) {
  if constexpr (std::is_same_v<I, Positions>) {
    start += index.first;
    return stride == 1 && index.first >= 0 && index.first + LANES <= size;
  } else {
    start += inside(index, size) * stride;
    return true;
  }
}

template <class T, int RANK> template <class... Index> auto Tensor<T, RANK>::operator()(Index... index) const {
  using Value = decltype(value_of(*data));
  if constexpr ((WIDE<Index> || ...)) {
    using Result = std::conditional_t<KIND<Value> == 2, Floats, std::conditional_t<KIND<Value> == 1, Ints, Mask>>;
    if constexpr ((WIDE<Index> + ...) == 1 && (std::is_same_v<Index, Positions> || ...)) {
      int64_t start = 0;
      int i = 0;
      bool side_by_side = true;
      ((side_by_side &= add_start(start, index, sizes[i], strides[i]), ++i), ...);
      if (side_by_side) return load_neighbours<Result>(data + start);
    }
    return gather<Result>(data, offsets_in(*this, index...));
  } else {
    return value_of(data[offsets_in(*this, index...).shared]);
  }
}

/// tensor[index] = value in the first `count` lanes.
template <class T, int RANK, class... Index>
INLINE void write(const Tensor<T, RANK>& tensor, int count, Floats value, Index... index) {
  const Offsets offsets = offsets_in(tensor, index...);
  for (int i = 0; i < count; ++i)
    tensor.data[offsets.shared + offsets.lane[i]] = element_of<T>(value.part[i / WIDTH][i % WIDTH]);
}
template <class T, int RANK, class... Index>
INLINE void write(const Tensor<T, RANK>& tensor, int, Real value, Index... index) {
  tensor.data[offsets_in(tensor, index...).shared] = element_of<T>(value);
}

/// tensor[index] += value in the first `count` lanes, one after the other: lanes may meet in one element.
template <class T, int RANK, class... Index>
INLINE void add(const Tensor<T, RANK>& tensor, int count, Floats value, Index... index) {
  const Offsets offsets = offsets_in(tensor, index...);
  for (int i = 0; i < count; ++i) {
    T& element = tensor.data[offsets.shared + offsets.lane[i]];
    element = element_of<T>(value_of(element) + value.part[i / WIDTH][i % WIDTH]);
  }
}
template <class T, int RANK, class... Index>
INLINE void add(const Tensor<T, RANK>& tensor, int, Real value, Index... index) {
  T& element = tensor.data[offsets_in(tensor, index...).shared];
  element = element_of<T>(value_of(element) + value);
}

}  // namespace attention
