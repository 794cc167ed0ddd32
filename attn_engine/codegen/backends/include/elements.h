// Elements of tensors in memory: their types, and conversion to and from the compute type, one by one or WIDTH at once.
#pragma once
#include "functions.h"

namespace attention {

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };
struct Float8 { uint8_t bits; };  // e4m3: no infinities, 0x7f is no number

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

INLINE Real value_of(Float8 x) {
  const uint32_t sign = (x.bits & 0x80u) << 24, rest = x.bits & 0x7fu;
  if (rest == 0x7fu) return bits_as_float(0x7fc00000u);
  const float magnitude = bits_as_float(rest << 20) * 0x1p120f;  // as for Half
  return bits_as_float(sign | float_as_bits(magnitude));
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

template <class T> struct Neighbours {
  typedef T Vector __attribute__((vector_size(WIDTH * sizeof(T))));
};
template <class T> INLINE auto neighbours(const void* x) {
  typename Neighbours<T>::Vector v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}
template <class T> using VectorOf = std::conditional_t<KIND<decltype(value_of(T{}))> == 2, FloatVector, IntVector>;

#if !defined(COMPUTE_IN_DOUBLE)
/// WIDTH 16-bit patterns, one in each lane, and back. (A compiler's own conversion takes three times as many instructions.)
INLINE IntVector load_halves(const void* x) {
#if defined(__AVX512F__)
  return (IntVector)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
#elif defined(__AVX2__)
  return (IntVector)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x));
#else
  return __builtin_convertvector(neighbours<uint16_t>(x), IntVector);
#endif
}
INLINE void store_halves(void* to, IntVector bits) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)bits));
#else
  const auto halves = __builtin_convertvector(bits, Neighbours<uint16_t>::Vector);
  __builtin_memcpy(to, &halves, sizeof halves);
#endif
}

/// Floats from 16-bit patterns, one in each lane: the steps of value_of and element_of, for all lanes.
INLINE FloatVector bfloat16_values(IntVector bits) { return (FloatVector)(bits << 16); }
INLINE FloatVector half_values(IntVector bits) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)bits));
#else
  const IntVector sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
  const IntVector magnitude = (IntVector)((FloatVector)rest * 0x1p112f);
  return (FloatVector)(sign | (rest >= 0x7c00 << 13 ? rest | 0x7f800000 : magnitude));
#endif
}

/// Of bytes that were widened with their sign, which then stands above the exponent already.
INLINE FloatVector float8_values(IntVector bytes) {
  const IntVector bits = (bytes << 20) & (int)0x87f00000;
  const FloatVector values = (FloatVector)bits * 0x1p120f;
  return (bits & 0x07f00000) == 0x07f00000 ? (FloatVector)(0x7fc00000 - IntVector{}) : values;
}

/// The 16-bit patterns next to floats.
INLINE IntVector bfloat16_bits(FloatVector x) {
  typedef uint32_t Unsigned __attribute__((vector_size(VECTOR_BYTES)));
  const Unsigned bits = (Unsigned)x;
  const IntVector rounded = (IntVector)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  return x != x ? 0x7fc0 - IntVector{} : rounded;
}
INLINE IntVector half_bits(FloatVector x) {
  const IntVector bits = (IntVector)x, sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  const IntVector normal = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  const IntVector subnormal = (IntVector)((FloatVector)rest + 0.5f) - (IntVector)(0.5f - FloatVector{});
  const IntVector finite = rest < 0x38800000 ? subnormal : normal;
  const IntVector end = rest > 0x7f800000 ? 0x7e00 - IntVector{} : 0x7c00 - IntVector{};
  return sign | (rest >= 0x477ff000 ? end : finite);
}
#endif

/// WIDTH elements from x on: floats, integers, or -1 for true.
template <class T> INLINE VectorOf<std::remove_const_t<T>> load_vector(const T* x) {
  using Element = std::remove_const_t<T>;
  if constexpr (std::is_same_v<Element, Real>) {
    return *(const FloatVector*)x;
#if !defined(COMPUTE_IN_DOUBLE)
  } else if constexpr (std::is_same_v<Element, BFloat16>) {
    return bfloat16_values(load_halves(x));
  } else if constexpr (std::is_same_v<Element, Half>) {
#if defined(__AVX512F__)
    return (FloatVector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
#elif defined(__AVX2__) && defined(__F16C__)
    return (FloatVector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
#else
    return half_values(load_halves(x));
#endif
  } else if constexpr (std::is_same_v<Element, Float8>) {
    return float8_values(__builtin_convertvector(neighbours<int8_t>(x), IntVector));
#endif
  } else if constexpr (std::is_same_v<Element, bool>) {
    return -__builtin_convertvector(neighbours<uint8_t>(x), IntVector);
  } else if constexpr (std::is_arithmetic_v<Element>) {
    return __builtin_convertvector(neighbours<Element>(x), VectorOf<Element>);
  } else {
    FloatVector v;
    for (int i = 0; i < WIDTH; ++i) v[i] = value_of(x[i]);
    return v;
  }
}

/// WIDTH floats as elements that may be copied to memory.
template <class T> struct Elements { T element[WIDTH]; };
template <class T> INLINE Elements<T> elements_of(FloatVector v) {
  Elements<T> result;
#if !defined(COMPUTE_IN_DOUBLE)
  if constexpr (std::is_same_v<T, BFloat16>) {
    store_halves(&result, bfloat16_bits(v));
    return result;
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)&result, _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__AVX2__) && defined(__F16C__)
    _mm_storeu_si128((__m128i*)&result, _mm256_cvtps_ph((__m256)v, 0));
#else
    store_halves(&result, half_bits(v));
#endif
    return result;
  }
#endif
  for (int i = 0; i < WIDTH; ++i) result.element[i] = element_of<T>(v[i]);
  return result;
}

/// The first `count` of WIDTH elements. Copied from a local array: a compiler may turn a loop of conditional stores into
/// a masked instruction that still faults on the memory it does not write.
template <class T> INLINE void store_vector(T* to, FloatVector v, int count) {
  if (std::is_same_v<T, Real> && count >= WIDTH) {
    *(FloatVector*)to = v;
  } else if (count > 0) {
    const Elements<T> elements = elements_of<T>(v);
    if (count >= WIDTH) __builtin_memcpy((void*)to, &elements, sizeof elements);
    else __builtin_memcpy((void*)to, &elements, count * sizeof(T));
  }
}

}  // namespace attention
