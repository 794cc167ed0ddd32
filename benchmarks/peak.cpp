// The most arithmetic that one core can do: multiply-adds between registers, in as many independent chains as hide
// their latency. float_chains is what float32 kernels are compared with; bfloat16_chains, where the processor has dot
// products of bfloat16 pairs, is for bfloat16 kernels.
#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int bytes = 64, chains = 16;  // of 32 registers
#elif defined(__AVX2__)
constexpr int bytes = 32, chains = 12;  // of 16 registers
#elif defined(__aarch64__)
constexpr int bytes = 16, chains = 24;  // of 32 registers
#else
constexpr int bytes = 16, chains = 12;
#endif

typedef float lanes __attribute__((vector_size(bytes)));

// Operations of one step: a multiplication and an addition per lane and chain.
extern "C" int64_t float_operations() { return int64_t(2) * chains * (bytes / 4); }

extern "C" void float_chains(int64_t steps, float factor, float *out) {
    lanes sum[chains];
    // Chains that start alike would be computed once by a compiler that notices.
    for (int chain = 0; chain < chains; ++chain) sum[chain] = lanes{} + float(chain);
    lanes a = lanes{} + factor, b = a;
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 32
        for (int chain = 0; chain < chains; ++chain) sum[chain] = sum[chain] * a + b;
    }
    lanes all{};
    for (int chain = 0; chain < chains; ++chain) all += sum[chain];
    for (int lane = 0; lane < bytes / 4; ++lane) out[lane] = all[lane];
}

#if defined(__AVX512BF16__)
extern "C" int64_t bfloat16_operations() { return int64_t(4) * chains * (bytes / 4); }

extern "C" void bfloat16_chains(int64_t steps, float factor, float *out) {
    __m512 sum[chains];
    for (int chain = 0; chain < chains; ++chain) sum[chain] = _mm512_set1_ps(float(chain));
    __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(factor), _mm512_set1_ps(factor)), b = a;
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 32
        for (int chain = 0; chain < chains; ++chain) sum[chain] = _mm512_dpbf16_ps(sum[chain], a, b);
    }
    __m512 all = _mm512_setzero_ps();
    for (int chain = 0; chain < chains; ++chain) all = _mm512_add_ps(all, sum[chain]);
    _mm512_storeu_ps(out, all);
}
#endif
