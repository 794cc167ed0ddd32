// Vectors of lanes: the values of generated CPU kernels. PARTS registers of WIDTH lanes each.
//
// Floats, Ints and Mask span all LANES. A kernel's arithmetic is written once: every operator takes any mixture
// of lanes and plain numbers and gives lanes when one operand has lanes. `Real` is the kernel's compute type.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define OUTLINE static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 64")
#if !defined(INFINITY)  // <cmath> would be a third of the time it takes to compile a kernel
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#endif

namespace attention {

#if defined(COMPUTE_IN_DOUBLE)
using Real = double;
using Int = int64_t;
#else
using Real = float;
using Int = int32_t;
#endif

#if !defined(LANE_REGISTERS)
#define LANE_REGISTERS 2
#endif

// Bytes of a register, and how many ACCUMULATORS leave room for the operands.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ACCUMULATORS = 16;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, ACCUMULATORS = 8;
#elif defined(__aarch64__)  // 32 registers
constexpr int VECTOR_BYTES = 16, ACCUMULATORS = 16;
#else
constexpr int VECTOR_BYTES = 16, ACCUMULATORS = 8;
#endif
// Registers of one value, and rows of a register block.
constexpr int PARTS = LANE_REGISTERS, ROWS = ACCUMULATORS / PARTS;
constexpr int WIDTH = VECTOR_BYTES / sizeof(Real), LANES = PARTS * WIDTH;

typedef Real FloatVector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(Real)), may_alias));
typedef Int IntVector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(Int)), may_alias));

/// a * b + c, rounded once where the processor can: for sums of products and for series. The compiler itself contracts
/// nothing, so that what a user wrote is rounded alike in every kernel that computes it.
INLINE FloatVector fma(FloatVector a, FloatVector b, FloatVector c) {
#if defined(__AVX512F__) && defined(COMPUTE_IN_DOUBLE)
  return (FloatVector)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX512F__)
  return (FloatVector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__) && defined(COMPUTE_IN_DOUBLE)
  return (FloatVector)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (FloatVector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__) && defined(COMPUTE_IN_DOUBLE)
  return (FloatVector)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#elif defined(__aarch64__)
  return (FloatVector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
INLINE FloatVector fma(Real a, FloatVector b, FloatVector c) { return fma(a - FloatVector{}, b, c); }

struct Floats { FloatVector part[PARTS]; };
struct Ints { IntVector part[PARTS]; };
struct Mask { IntVector part[PARTS]; };  // -1 where true
struct Positions : Ints { int first; };   // first, first + 1, ...: one per lane
struct Descending : Ints { int first; };  // first, first - 1, ...

/// Positions held between two bounds: `met` where a lane may have met one, and the lanes are no neighbours any more.
template <class P> struct Bounded : Ints { int first; bool met; };

template <class Result, class F> INLINE Result each(F f) {
  Result result;
  UNROLL for (int p = 0; p < PARTS; ++p) result.part[p] = f(p);
  return result;
}

INLINE Floats load(const Real* x) { return each<Floats>([&](int p) { return *(const FloatVector*)(x + p * WIDTH); }); }
INLINE void store(Real* x, Floats v) { UNROLL for (int p = 0; p < PARTS; ++p) *(FloatVector*)(x + p * WIDTH) = v.part[p]; }

INLINE Positions positions(int first) {
  Positions result;
  UNROLL for (int p = 0; p < PARTS; ++p)
    UNROLL for (int i = 0; i < WIDTH; ++i) result.part[p][i] = first + p * WIDTH + i;
  result.first = first;
  return result;
}

INLINE Descending descending(int first) {
  const Positions up = positions(0);
  Descending result;
  UNROLL for (int p = 0; p < PARTS; ++p) result.part[p] = first - up.part[p];
  result.first = first;
  return result;
}

/// The lanes of one register in the opposite order.
template <class Vector> INLINE Vector turned(Vector x) {
#if defined(__AVX512F__) && !defined(COMPUTE_IN_DOUBLE)
  const __m512i order = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return (Vector)_mm512_permutexvar_epi32(order, (__m512i)x);
#elif defined(__AVX2__) && !defined(COMPUTE_IN_DOUBLE)
  return (Vector)_mm256_permutevar8x32_epi32((__m256i)x, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0));
#else
  Vector result = x;
  UNROLL for (int i = 0; i < WIDTH; ++i) result[i] = x[WIDTH - 1 - i];
  return result;
#endif
}

// -- conversions between kinds, as Python's: bool < int < float

template <class T> constexpr int KIND = std::is_same_v<T, Floats> || std::is_floating_point_v<T> ? 2
                                        : std::is_same_v<T, Mask> || std::is_same_v<T, bool>     ? 0 : 1;
template <class T> constexpr bool WIDE = std::is_same_v<T, Floats> || std::is_same_v<T, Mask> || std::is_base_of_v<Ints, T>;
template <class A, class B> using IfWide = std::enable_if_t<WIDE<A> || WIDE<B>, int>;
template <class A, class B> using IfScalar = std::enable_if_t<!WIDE<A> && !WIDE<B>, int>;

INLINE Floats floats(Floats x) { return x; }
INLINE Floats floats(Ints x) { return each<Floats>([&](int p) { return __builtin_convertvector(x.part[p], FloatVector); }); }
INLINE Floats floats(Mask x) { return each<Floats>([&](int p) { return __builtin_convertvector(-x.part[p], FloatVector); }); }
INLINE Floats floats(Real x) { return each<Floats>([&](int) { return x - FloatVector{}; }); }
INLINE Ints ints(Ints x) { return x; }
INLINE Ints ints(Mask x) { return each<Ints>([&](int p) { return -x.part[p]; }); }
INLINE Ints ints(int x) { return each<Ints>([&](int) { return (Int)x - IntVector{}; }); }
INLINE Mask mask(Mask x) { return x; }
INLINE Mask mask(bool x) { return each<Mask>([&](int) { return -(Int)x - IntVector{}; }); }

INLINE Floats fill(Real x) { return floats(x); }
INLINE Floats to_float(Floats x) { return x; }
INLINE Floats to_float(Ints x) { return floats(x); }
INLINE Floats to_float(Mask x) { return floats(x); }
template <class A, IfScalar<A, A> = 0> INLINE Real to_float(A x) { return (Real)x; }
INLINE Ints to_int(Floats x) { return each<Ints>([&](int p) { return __builtin_convertvector(x.part[p], IntVector); }); }
INLINE Ints to_int(Ints x) { return x; }
INLINE Ints to_int(Mask x) { return ints(x); }
template <class A, IfScalar<A, A> = 0> INLINE int to_int(A x) { return (int)x; }

template <class A, class B> INLINE Floats fma(A a, B b, Floats c) {
  const Floats x = floats(a), y = floats(b);
  return each<Floats>([&](int p) { return fma(x.part[p], y.part[p], c.part[p]); });
}

// -- operators

#define ARITHMETIC(OP)                                                                              \
  template <class A, class B, IfWide<A, B> = 0> INLINE auto operator OP(A a, B b) {                 \
    if constexpr (KIND<A> == 2 || KIND<B> == 2) {                                                   \
      const Floats x = floats(a), y = floats(b);                                                    \
      return each<Floats>([&](int p) { return x.part[p] OP y.part[p]; });                           \
    } else {                                                                                        \
      const Ints x = ints(a), y = ints(b);                                                          \
      return each<Ints>([&](int p) { return x.part[p] OP y.part[p]; });                             \
    }                                                                                               \
  }
#define COMPARISON(OP)                                                                              \
  template <class A, class B, IfWide<A, B> = 0> INLINE Mask operator OP(A a, B b) {                 \
    if constexpr (KIND<A> == 2 || KIND<B> == 2) {                                                   \
      const Floats x = floats(a), y = floats(b);                                                    \
      return each<Mask>([&](int p) { return (IntVector)(x.part[p] OP y.part[p]); });                \
    } else {                                                                                        \
      const Ints x = ints(a), y = ints(b);                                                          \
      return each<Mask>([&](int p) { return (IntVector)(x.part[p] OP y.part[p]); });                \
    }                                                                                               \
  }
#define LOGICAL(OP)                                                                                 \
  template <class A, class B, IfWide<A, B> = 0> INLINE Mask operator OP(A a, B b) {                 \
    const Mask x = mask(a), y = mask(b);                                                            \
    return each<Mask>([&](int p) { return x.part[p] OP y.part[p]; });                               \
  }
ARITHMETIC(+) ARITHMETIC(-) ARITHMETIC(*)
COMPARISON(<) COMPARISON(<=) COMPARISON(==) COMPARISON(!=)
LOGICAL(&) LOGICAL(|)
#undef ARITHMETIC
#undef COMPARISON
#undef LOGICAL

template <class A, class B, IfWide<A, B> = 0> INLINE Floats operator/(A a, B b) {
  const Floats x = floats(a), y = floats(b);
  return each<Floats>([&](int p) { return x.part[p] / y.part[p]; });
}
// Positions moved by a number are still neighbours.
INLINE Positions operator+(Positions x, int by) { return positions(x.first + by); }
INLINE Positions operator+(int by, Positions x) { return positions(x.first + by); }
INLINE Positions operator-(Positions x, int by) { return positions(x.first - by); }
INLINE Descending operator-(int from, Positions x) { return descending(from - x.first); }
INLINE Descending operator+(Descending x, int by) { return descending(x.first + by); }
INLINE Descending operator+(int by, Descending x) { return descending(x.first + by); }
INLINE Descending operator-(Descending x, int by) { return descending(x.first - by); }
INLINE Floats operator-(Floats x) { return each<Floats>([&](int p) { return -x.part[p]; }); }
INLINE Ints operator-(Ints x) { return each<Ints>([&](int p) { return -x.part[p]; }); }
INLINE Mask operator!(Mask x) { return each<Mask>([&](int p) { return ~x.part[p]; }); }

/// c ? a : b in each lane; a plain condition chooses for all lanes.
template <class A, class B> INLINE auto where(Mask c, A a, B b) {
  if constexpr (KIND<A> == 2 || KIND<B> == 2) {
    const Floats x = floats(a), y = floats(b);
    return each<Floats>([&](int p) { return c.part[p] ? x.part[p] : y.part[p]; });
  } else if constexpr (KIND<A> == 1 || KIND<B> == 1) {
    const Ints x = ints(a), y = ints(b);
    return each<Ints>([&](int p) { return c.part[p] ? x.part[p] : y.part[p]; });
  } else {
    const Mask x = mask(a), y = mask(b);
    return each<Mask>([&](int p) { return c.part[p] ? x.part[p] : y.part[p]; });
  }
}
template <class A, class B, IfWide<A, B> = 0> INLINE auto where(bool c, A a, B b) { return where(mask(c), a, b); }
template <class A, class B, IfScalar<A, B> = 0> INLINE auto where(bool c, A a, B b) { return c ? a : b; }

// -- largest and smallest

#if defined(__AVX512F__) && !defined(COMPUTE_IN_DOUBLE)
INLINE FloatVector larger(FloatVector a, FloatVector b) { return (FloatVector)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE FloatVector smaller(FloatVector a, FloatVector b) { return (FloatVector)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__) && !defined(COMPUTE_IN_DOUBLE)
INLINE FloatVector larger(FloatVector a, FloatVector b) { return (FloatVector)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE FloatVector smaller(FloatVector a, FloatVector b) { return (FloatVector)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE FloatVector larger(FloatVector a, FloatVector b) { return a > b ? a : b; }
INLINE FloatVector smaller(FloatVector a, FloatVector b) { return a < b ? a : b; }
#endif
template <class P> constexpr bool IN_A_ROW = std::is_same_v<P, Positions> || std::is_same_v<P, Descending>;
template <class P> constexpr bool IN_A_ROW<Bounded<P>> = true;
template <class P> INLINE Bounded<P> bounded(P x) { return {{x}, x.first, false}; }
template <class P> INLINE Bounded<P> bounded(Bounded<P> x) { return x; }
INLINE int lowest(Bounded<Positions> x) { return x.first; }
INLINE int lowest(Bounded<Descending> x) { return x.first - (LANES - 1); }

template <class P> INLINE auto at_least(P x, int bound) {
  auto result = bounded(x);
  result.met |= lowest(result) < bound;
  UNROLL for (int p = 0; p < PARTS; ++p) result.part[p] = x.part[p] < bound ? bound - IntVector{} : x.part[p];
  return result;
}
template <class P> INLINE auto at_most(P x, int bound) {
  auto result = bounded(x);
  result.met |= lowest(result) + (LANES - 1) > bound;
  UNROLL for (int p = 0; p < PARTS; ++p) result.part[p] = x.part[p] > bound ? bound - IntVector{} : x.part[p];
  return result;
}

template <class A, class B, IfWide<A, B> = 0> INLINE auto max(A a, B b) {
  if constexpr (IN_A_ROW<A> && std::is_same_v<B, int>) {
    return at_least(a, b);
  } else if constexpr (IN_A_ROW<B> && std::is_same_v<A, int>) {
    return at_least(b, a);
  } else if constexpr (KIND<A> == 2 || KIND<B> == 2) {
    const Floats x = floats(a), y = floats(b);
    return each<Floats>([&](int p) { return larger(x.part[p], y.part[p]); });
  } else {
    const Ints x = ints(a), y = ints(b);
    return where(x < y, y, x);
  }
}
template <class A, class B, IfWide<A, B> = 0> INLINE auto min(A a, B b) {
  if constexpr (IN_A_ROW<A> && std::is_same_v<B, int>) {
    return at_most(a, b);
  } else if constexpr (IN_A_ROW<B> && std::is_same_v<A, int>) {
    return at_most(b, a);
  } else if constexpr (KIND<A> == 2 || KIND<B> == 2) {
    const Floats x = floats(a), y = floats(b);
    return each<Floats>([&](int p) { return smaller(x.part[p], y.part[p]); });
  } else {
    const Ints x = ints(a), y = ints(b);
    return where(x < y, x, y);
  }
}
template <class A, class B, IfScalar<A, B> = 0> INLINE auto max(A a, B b) { return a > b ? a : b; }
template <class A, class B, IfScalar<A, B> = 0> INLINE auto min(A a, B b) { return a < b ? a : b; }

// -- across the first `count` lanes

template <class F> INLINE Real fold(Floats x, int count, Real start, F f) {
  Real total = start;
  for (int lane = 0; lane < count; ++lane) total = f(total, x.part[lane / WIDTH][lane % WIDTH]);
  return total;
}
INLINE Real sum_lanes(Floats x, int count) { return fold(x, count, 0, [](Real a, Real b) { return a + b; }); }
INLINE Real max_lanes(Floats x, int count) { return fold(x, count, -INFINITY, [](Real a, Real b) { return a > b ? a : b; }); }
INLINE Real min_lanes(Floats x, int count) { return fold(x, count, INFINITY, [](Real a, Real b) { return a < b ? a : b; }); }

}  // namespace attention
