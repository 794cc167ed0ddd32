// Elementary functions of lanes and of numbers. In float, exp2, exp, tanh and sigmoid are polynomials; the rest,
// and everything in double, calls the C library lane by lane.
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
template <class A, class B, IfWide<A, B> = 0> INLINE Ints floor_div(A a, B b) {
  const Ints x = ints(a), y = ints(b);
  return per_lane<Ints>([&](int p, int i) { return floor_div(x.part[p][i], y.part[p][i]); });
}
template <class A, class B, IfWide<A, B> = 0> INLINE Ints floor_mod(A a, B b) {
  const Ints x = ints(a), y = ints(b);
  return per_lane<Ints>([&](int p, int i) { return floor_mod(x.part[p][i], y.part[p][i]); });
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
BY_LIBRARY(log) BY_LIBRARY(log2) BY_LIBRARY(sqrt) BY_LIBRARY(sin) BY_LIBRARY(cos) BY_LIBRARY(floor)
INLINE Floats rsqrt(Floats x) { return Real(1) / sqrt(x); }
INLINE Floats abs(Floats x) { return max(x, -x); }
INLINE Ints abs(Ints x) { return max(x, -x); }

#if defined(COMPUTE_IN_DOUBLE)

BY_LIBRARY(exp) BY_LIBRARY(exp2) BY_LIBRARY(tanh)

#else

/// y * 2^whole; exactly 0 where `tiny`, infinity above the range, NaN where y is NaN.
#if defined(__AVX512F__)
INLINE FloatVector round_whole(FloatVector x) { return (FloatVector)_mm512_roundscale_ps((__m512)x, 8); }
INLINE FloatVector scale_by(FloatVector y, FloatVector whole, FloatVector x, float lowest) {
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(lowest), _CMP_NLT_UQ);
  return (FloatVector)_mm512_maskz_scalef_ps(normal, (__m512)y, (__m512)whole);
}
#else
INLINE FloatVector round_whole(FloatVector x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for a fraction
  return (x + magic) - magic;
}
INLINE FloatVector scale_by(FloatVector y, FloatVector whole, FloatVector x, float lowest) {
  const IntVector exponent = __builtin_convertvector(whole, IntVector);
  const FloatVector scaled = (FloatVector)((IntVector)y + (exponent << 23));
  const FloatVector bounded = whole > 128.0f ? INFINITY - FloatVector{} : scaled;
  return x < lowest ? FloatVector{} : x != x ? x : bounded;
}
#endif

/// Within 1 ulp. Results below 2^-126 are 0, so a masked score (-inf) weighs exactly nothing.
INLINE FloatVector exp2(FloatVector v) {
  const FloatVector x = smaller(129.0f - FloatVector{}, v);  // keeps infinity from becoming inf - inf, and NaN as it is
  const FloatVector whole = round_whole(x), f = x - whole;
  FloatVector y = 1.534580766e-4f - FloatVector{};
  y = y * f + 1.339993090e-3f, y = y * f + 9.618489072e-3f, y = y * f + 5.550328642e-2f;
  y = y * f + 2.402264625e-1f, y = y * f + 6.931471825e-1f, y = y * f + 1.0f;
  return scale_by(y, whole, x, -126.0f);
}

/// Within 2 ulp. The multiple of ln 2 is subtracted in two parts, the first of them exact.
INLINE FloatVector exp(FloatVector v) {
  const FloatVector x = smaller(90.0f - FloatVector{}, v);
  const FloatVector whole = round_whole(x * 1.44269504f);
  const FloatVector f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  FloatVector y = 1.383684226e-3f - FloatVector{};
  y = y * f + 8.374815807e-3f, y = y * f + 4.166822508e-2f, y = y * f + 1.666641980e-1f;
  y = y * f + 4.999999106e-1f, y = y * f + 1.0f, y = y * f + 1.0f;
  return scale_by(y, whole, x, -87.336540f);
}

INLINE Floats exp2(Floats x) { return each<Floats>([&](int p) { return exp2(x.part[p]); }); }
INLINE Floats exp(Floats x) { return each<Floats>([&](int p) { return exp(x.part[p]); }); }

/// An odd rational function: a few ulp everywhere, no cancellation near 0, and 1 where tanh rounds to 1.
INLINE Floats tanh(Floats v) {
  const Floats x = max(-7.90531110763549805f, min(7.90531110763549805f, v));  // in this order NaN stays NaN
  const Floats s = x * x;
  Floats top = s * -2.76076847742355e-16f + 2.00018790482477e-13f;
  top = top * s + -8.60467152213735e-11f, top = top * s + 5.12229709037114e-08f, top = top * s + 1.48572235717979e-05f;
  top = top * s + 6.37261928875436e-04f, top = top * s + 4.89352455891786e-03f;
  Floats bottom = s * 1.19825839466702e-06f + 1.18534705686654e-04f;
  bottom = bottom * s + 2.26843463243900e-03f, bottom = bottom * s + 4.89352518554385e-03f;
  return where(8.3f < v, 1.0f, where(v < -8.3f, -1.0f, x * top / bottom));
}

#endif

/// No overflow: exp of a large negative number is 0, of a large positive one infinity, and 1 / infinity is 0.
INLINE Floats sigmoid(Floats x) { return Real(1) / (Real(1) + exp(-x)); }

#undef BY_LIBRARY

}  // namespace attention
