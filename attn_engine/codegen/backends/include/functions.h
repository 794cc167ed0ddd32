// Elementary functions of lanes and of numbers. Square roots and floors are instructions; exp2, exp, log2, log, tanh and
// sigmoid are polynomials in float; the rest, and all of them in double, calls the C library lane by lane.
#pragma once
#include "lanes.h"

namespace attention {

// -- integers follow Python: // and % round toward minus infinity

INLINE int floor_div(int a, int b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
INLINE int floor_mod(int a, int b) { return a - floor_div(a, b) * b; }

template <class Result, class F> INLINE Result per_lane(F f) {
  Result result;
  for (int p = 0; p < PARTS; ++p)
    for (int i = 0; i < WIDTH; ++i) result.part[p][i] = f(p, i);
  return result;
}
// No processor divides lanes of integers. 32-bit ones divide as doubles, whose quotients are exact to the last integer;
// not inlined, for a kernel divides in each of its unrolled rows.
OUTLINE Ints quotients(Ints x, Ints y) {
  return each<Ints>([&](int p) {
    IntVector result;
    for (int i = 0; i < WIDTH; ++i) {
      const Int a = x.part[p][i], b = y.part[p][i];
      result[i] = sizeof(Int) == 4 ? (Int)((double)a / (double)b) : a / b;
    }
    return result;
  });
}
template <class A, class B, IfWide<A, B> = 0> INLINE Ints floor_div(A a, B b) {
  const Ints x = ints(a), y = ints(b), quotient = quotients(x, y);
  return quotient + ints((quotient * y != x) & ((x < 0) != (y < 0))) * -1;
}
template <class A, class B, IfWide<A, B> = 0> INLINE Ints floor_mod(A a, B b) { return ints(a) - floor_div(a, b) * b; }

// -- bits of 32-bit words, from the lowest; the words may lie in wider integers

INLINE bool bit_of(int word, int place) { return word >> place & 1; }
template <class A, class B, IfWide<A, B> = 0> INLINE Mask bit_of(A word, B place) {
  const Ints x = ints(word), y = ints(place);
  return each<Ints>([&](int p) { return x.part[p] >> y.part[p] & 1; }) != 0;
}

// -- numbers

template <class A, IfScalar<A, A> = 0> INLINE A abs(A x) { return x < 0 ? -x : x; }
#define OF_NUMBER(F) \
  INLINE Real F(Real x) { return sizeof(Real) == sizeof(float) ? (Real)__builtin_##F##f(x) : (Real)__builtin_##F(x); }
OF_NUMBER(exp) OF_NUMBER(exp2) OF_NUMBER(log) OF_NUMBER(log2) OF_NUMBER(tanh) OF_NUMBER(sqrt) OF_NUMBER(sin)
OF_NUMBER(cos) OF_NUMBER(floor)
#undef OF_NUMBER
INLINE Real sigmoid(Real x) { return 1 / (1 + exp(-x)); }
INLINE Real rsqrt(Real x) { return 1 / sqrt(x); }

// -- lanes, by the library

#define BY_LIBRARY(F) \
  INLINE Floats F(Floats x) { return per_lane<Floats>([&](int p, int i) { return F((Real)x.part[p][i]); }); }
BY_LIBRARY(sin) BY_LIBRARY(cos)

// -- lanes, by one instruction

#if defined(COMPUTE_IN_DOUBLE)
#define IN_LANES(INSTRUCTION) INSTRUCTION##d
typedef double Lanes __attribute__((vector_size(VECTOR_BYTES)));
#else
#define IN_LANES(INSTRUCTION) INSTRUCTION##s
typedef float Lanes __attribute__((vector_size(VECTOR_BYTES)));
#endif
#if defined(__AVX512F__)
INLINE FloatVector sqrt(FloatVector x) { return (FloatVector)IN_LANES(_mm512_sqrt_p)((Lanes)x); }
INLINE FloatVector floor(FloatVector x) { return (FloatVector)IN_LANES(_mm512_roundscale_p)((Lanes)x, 9); }
#elif defined(__AVX2__)
INLINE FloatVector sqrt(FloatVector x) { return (FloatVector)IN_LANES(_mm256_sqrt_p)((Lanes)x); }
INLINE FloatVector floor(FloatVector x) { return (FloatVector)IN_LANES(_mm256_floor_p)((Lanes)x); }
#elif defined(__x86_64__)
INLINE FloatVector sqrt(FloatVector x) { return (FloatVector)IN_LANES(_mm_sqrt_p)((Lanes)x); }
#endif
#undef IN_LANES

#if defined(__x86_64__)
INLINE Floats sqrt(Floats x) { return each<Floats>([&](int p) { return sqrt(x.part[p]); }); }
#else
BY_LIBRARY(sqrt)
#endif
#if defined(__AVX2__)
INLINE Floats floor(Floats x) { return each<Floats>([&](int p) { return floor(x.part[p]); }); }
#else
BY_LIBRARY(floor)
#endif
INLINE Floats rsqrt(Floats x) { return Real(1) / sqrt(x); }
INLINE Floats abs(Floats x) { return max(x, -x); }
INLINE Ints abs(Ints x) { return max(x, -x); }

#if defined(COMPUTE_IN_DOUBLE)

BY_LIBRARY(exp) BY_LIBRARY(exp2) BY_LIBRARY(log) BY_LIBRARY(log2) BY_LIBRARY(tanh)

#else

/// y * 2^whole, a function of x: exactly 0 where x < lowest, infinity from `highest` on, NaN where x is NaN.
#if defined(__AVX512F__)
INLINE FloatVector round_whole(FloatVector x) { return (FloatVector)_mm512_roundscale_ps((__m512)x, 8); }
INLINE FloatVector scale_by(FloatVector y, FloatVector whole, FloatVector x, float lowest, float) {
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(lowest), _CMP_NLT_UQ);
  return (FloatVector)_mm512_maskz_scalef_ps(normal, (__m512)y, (__m512)whole);
}
#else
INLINE FloatVector round_whole(FloatVector x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for a fraction
  return (x + magic) - magic;
}
INLINE FloatVector scale_by(FloatVector y, FloatVector whole, FloatVector x, float lowest, float highest) {
  const IntVector exponent = __builtin_convertvector(whole, IntVector);
  const FloatVector scaled = (FloatVector)((IntVector)y + (exponent << 23));
  const FloatVector bounded = x >= highest ? INFINITY - FloatVector{} : scaled;
  return x < lowest ? FloatVector{} : x != x ? x : bounded;
}
#endif

/// The series whose coefficients are given from the highest power down.
template <class... Rest> INLINE FloatVector series(FloatVector x, Real highest, Rest... rest) {
  FloatVector y = highest - FloatVector{};
  ((y = fma(y, x, rest - FloatVector{})), ...);
  return y;
}

/// Within 1 ulp. Results below 2^-126 are 0, so a masked score (-inf) weighs exactly nothing.
INLINE FloatVector exp2(FloatVector v) {
  const FloatVector x = smaller(129.0f - FloatVector{}, v);  // keeps infinity from becoming inf - inf, and NaN as it is
  const FloatVector whole = round_whole(x), f = x - whole;
  const FloatVector y = series(f, 1.534580766e-4f, 1.339993090e-3f, 9.618489072e-3f, 5.550328642e-2f, 2.402264625e-1f,
                               6.931471825e-1f, 1.0f);
  return scale_by(y, whole, x, -126.0f, 128.0f);
}

/// Within 2 ulp. The multiple of ln 2 is subtracted in two parts, the first of them exact.
INLINE FloatVector exp(FloatVector v) {
  const FloatVector x = smaller(90.0f - FloatVector{}, v);
  const FloatVector whole = round_whole(x * 1.44269504f);
  const FloatVector f = fma(2.12194440e-4f, whole, fma(-0.693359375f, whole, x));
  const FloatVector y = series(f, 1.383684226e-3f, 8.374815807e-3f, 4.166822508e-2f, 1.666641980e-1f, 4.999999106e-1f,
                               1.0f, 1.0f);
  return scale_by(y, whole, x, -87.336540f, 88.7228394f);
}

/// fraction * 2^exponent = x > 0, the fraction from sqrt(1/2) to sqrt(2).
struct Binary { FloatVector fraction, exponent; };
INLINE Binary binary_of(FloatVector x) {
  const IntVector tiny = x < 0x1p-126f;
  const IntVector bits = (IntVector)(tiny ? x * 0x1p23f : x) - 0x3f3504f3;
  const IntVector exponent = (bits >> 23) + (tiny & -23);
  return {(FloatVector)((bits & 0x7fffff) + 0x3f3504f3), __builtin_convertvector(exponent, FloatVector)};
}

/// log(1 + f) - f for 1 + f as `binary_of` gives it.
INLINE FloatVector log_rest(FloatVector f) {
  const FloatVector y = series(f, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f,
                               1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f,
                               3.3333331174e-1f, -0.5f);
  return y * (f * f);
}

/// `y` where x has a logarithm; at the ends what a logarithm is there.
INLINE FloatVector log_ends(FloatVector x, FloatVector y) {
  const FloatVector above = x < 0.0f ? NAN - FloatVector{} : x;  // infinity and NaN as they are
  const FloatVector end = x == 0.0f ? -INFINITY - FloatVector{} : above;
  return ((x > 0.0f) & (x < INFINITY)) ? y : end;
}

/// Within 2 ulp.
INLINE FloatVector log(FloatVector x) {
  const Binary s = binary_of(x);
  const FloatVector f = s.fraction - 1.0f;
  return log_ends(x, fma(0.693359375f, s.exponent, fma(-2.12194440e-4f, s.exponent, log_rest(f)) + f));
}

/// Within 2 ulp. f / ln 2 is added in two parts, the first of them exact.
INLINE FloatVector log2(FloatVector x) {
  const Binary s = binary_of(x);
  const FloatVector f = s.fraction - 1.0f, rest = log_rest(f);
  return log_ends(x, (fma(0.442695041f, rest, 0.442695041f * f) + rest) + f + s.exponent);
}

INLINE Floats log(Floats x) { return each<Floats>([&](int p) { return log(x.part[p]); }); }
INLINE Floats log2(Floats x) { return each<Floats>([&](int p) { return log2(x.part[p]); }); }
INLINE Floats exp2(Floats x) { return each<Floats>([&](int p) { return exp2(x.part[p]); }); }
INLINE Floats exp(Floats x) { return each<Floats>([&](int p) { return exp(x.part[p]); }); }

/// An odd rational function: a few ulp everywhere, no cancellation near 0, and 1 where tanh rounds to 1.
INLINE Floats tanh(Floats v) {
  const Floats x = max(-7.90531110763549805f, min(7.90531110763549805f, v));  // in this order NaN stays NaN
  const Floats inside = each<Floats>([&](int p) {
    const FloatVector s = x.part[p] * x.part[p];
    const FloatVector top = series(s, -2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f,
                                   5.12229709037114e-08f, 1.48572235717979e-05f, 6.37261928875436e-04f,
                                   4.89352455891786e-03f);
    return x.part[p] * (top / series(s, 1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f,
                                     4.89352518554385e-03f));
  });
  return where(8.3f < v, 1.0f, where(v < -8.3f, -1.0f, inside));
}

#endif

/// No overflow: exp of a large negative number is 0, of a large positive one infinity, and 1 / infinity is 0.
INLINE Floats sigmoid(Floats x) { return Real(1) / (Real(1) + exp(-x)); }

#undef BY_LIBRARY

}  // namespace attention
