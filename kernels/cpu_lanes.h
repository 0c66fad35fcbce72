// What the CPU kernels need of an instruction set (AVX-512, AVX2, or none): `Lanes`, vectors of fp32 and of sign words.
//
// The including code may define BITDELTA_AVX512, BITDELTA_AVX2 or BITDELTA_PORTABLE as 1; otherwise the compiler's
// target decides.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if !defined(BITDELTA_AVX512) && !defined(BITDELTA_AVX2) && !defined(BITDELTA_PORTABLE)
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define BITDELTA_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define BITDELTA_AVX2 1
#else
#define BITDELTA_PORTABLE 1
#endif
#endif

// The instruction set is part of every symbol, so that copies built for different machines never stand in for each other.
#if defined(BITDELTA_AVX512)
#include <immintrin.h>
#define BITDELTA_ISA avx512
#elif defined(BITDELTA_AVX2)
#include <immintrin.h>
#define BITDELTA_ISA avx2
#else
#define BITDELTA_ISA portable
#endif

#if defined(__GNUC__)
#define BITDELTA_INLINE inline __attribute__((always_inline))
#define BITDELTA_PREFETCH(address) __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 1)
#else
#define BITDELTA_INLINE inline
#define BITDELTA_PREFETCH(address) ((void)(address))
#endif

namespace bitdelta {
inline namespace BITDELTA_ISA {

// The instruction sets: `lanes` outputs side by side, groups of `bits` features.

#if defined(BITDELTA_AVX512)
struct Lanes {
  using Float = __m512;
  using Words = __m512i;
  static constexpr int64_t lanes = 16, bits = 4, blocks = 4;

  static BITDELTA_INLINE Float zero() { return _mm512_setzero_ps(); }
  static BITDELTA_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
  static BITDELTA_INLINE void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static BITDELTA_INLINE Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static BITDELTA_INLINE Float broadcast(float v) { return _mm512_set1_ps(v); }
  static BITDELTA_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  // a + b. As a multiplication by 1 it runs beside the shuffles, where an addition would compete with them for ports (Zen 4).
  static BITDELTA_INLINE Float add(Float a, Float b, Float one) { return _mm512_fmadd_ps(a, one, b); }
  static BITDELTA_INLINE float total(Float v) { return _mm512_reduce_add_ps(v); }
  static BITDELTA_INLINE Words next_group(Words v) { return _mm512_srli_epi32(v, bits); }
  static BITDELTA_INLINE Float lookup(Float table, Words v) { return _mm512_permutexvar_ps(v, table); }

  static BITDELTA_INLINE __m128i four_words(const int32_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  // Four words each of rows 0, 4, 8 and 12 from p.
  static BITDELTA_INLINE __m512i quarter_rows(const int32_t* p, int64_t stride) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(four_words(p)), four_words(p + 4 * stride), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(four_words(p + 8 * stride)), four_words(p + 12 * stride), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  // Four words of `lanes` rows, `stride` words apart, to out[word * out_stride + row].
  static BITDELTA_INLINE void transpose(const int32_t* p, int64_t stride, uint32_t* out, int64_t out_stride) {
    const __m512i a = quarter_rows(p, stride), b = quarter_rows(p + stride, stride);
    const __m512i c = quarter_rows(p + 2 * stride, stride), d = quarter_rows(p + 3 * stride, stride);
    const __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
    const __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(ab0, cd0));
    _mm512_storeu_si512(out + out_stride, _mm512_unpackhi_epi64(ab0, cd0));
    _mm512_storeu_si512(out + 2 * out_stride, _mm512_unpacklo_epi64(ab1, cd1));
    _mm512_storeu_si512(out + 3 * out_stride, _mm512_unpackhi_epi64(ab1, cd1));
  }
};
#elif defined(BITDELTA_AVX2)
struct Lanes {
  using Float = __m256;
  using Words = __m256i;
  static constexpr int64_t lanes = 8, bits = 3, blocks = 4;

  static BITDELTA_INLINE Float zero() { return _mm256_setzero_ps(); }
  static BITDELTA_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
  static BITDELTA_INLINE void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static BITDELTA_INLINE Words load_words(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static BITDELTA_INLINE Float broadcast(float v) { return _mm256_set1_ps(v); }
  static BITDELTA_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  // a + b. As a multiplication by 1 it runs beside the shuffles, where an addition would compete with them for ports (Zen 4).
  static BITDELTA_INLINE Float add(Float a, Float b, Float one) { return _mm256_fmadd_ps(a, one, b); }
  static BITDELTA_INLINE float total(Float v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static BITDELTA_INLINE Words next_group(Words v) { return _mm256_srli_epi32(v, bits); }
  static BITDELTA_INLINE Float lookup(Float table, Words v) { return _mm256_permutevar8x32_ps(table, v); }

  static BITDELTA_INLINE __m256i half_rows(const int32_t* p, int64_t stride) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 4 * stride)), 1);
  }
  static BITDELTA_INLINE void store_words(uint32_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  // Four words of `lanes` rows, `stride` words apart, to out[word * out_stride + row].
  static BITDELTA_INLINE void transpose(const int32_t* p, int64_t stride, uint32_t* out, int64_t out_stride) {
    const __m256i a = half_rows(p, stride), b = half_rows(p + stride, stride);
    const __m256i c = half_rows(p + 2 * stride, stride), d = half_rows(p + 3 * stride, stride);
    const __m256i ab0 = _mm256_unpacklo_epi32(a, b), ab1 = _mm256_unpackhi_epi32(a, b);
    const __m256i cd0 = _mm256_unpacklo_epi32(c, d), cd1 = _mm256_unpackhi_epi32(c, d);
    store_words(out, _mm256_unpacklo_epi64(ab0, cd0));
    store_words(out + out_stride, _mm256_unpackhi_epi64(ab0, cd0));
    store_words(out + 2 * out_stride, _mm256_unpacklo_epi64(ab1, cd1));
    store_words(out + 3 * out_stride, _mm256_unpackhi_epi64(ab1, cd1));
  }
};
#else
struct Lanes {
  static constexpr int64_t lanes = 4, bits = 4, blocks = 2;
  struct Float { float at[lanes]; };
  struct Words { uint32_t at[lanes]; };

  static BITDELTA_INLINE Float zero() { return Float{}; }
  static BITDELTA_INLINE Float load(const float* p) { Float v; std::memcpy(v.at, p, sizeof v); return v; }
  static BITDELTA_INLINE void store(float* p, Float v) { std::memcpy(p, v.at, sizeof v); }
  static BITDELTA_INLINE Words load_words(const uint32_t* p) { Words v; std::memcpy(v.at, p, sizeof v); return v; }
  static BITDELTA_INLINE Float broadcast(float v) { Float out; for (int64_t i = 0; i < lanes; ++i) out.at[i] = v; return out; }
  static BITDELTA_INLINE Float fma(Float a, Float b, Float c) { for (int64_t i = 0; i < lanes; ++i) c.at[i] += a.at[i] * b.at[i]; return c; }
  static BITDELTA_INLINE Float add(Float a, Float b, Float) { for (int64_t i = 0; i < lanes; ++i) a.at[i] += b.at[i]; return a; }
  static BITDELTA_INLINE Words next_group(Words v) { for (int64_t i = 0; i < lanes; ++i) v.at[i] >>= bits; return v; }
  static BITDELTA_INLINE Float lookup(const float* table, Words v) {
    Float out;
    for (int64_t i = 0; i < lanes; ++i) out.at[i] = table[v.at[i] & 15];
    return out;
  }
  // Four words of `lanes` rows, `stride` words apart, to out[word * out_stride + row].
  static BITDELTA_INLINE void transpose(const int32_t* p, int64_t stride, uint32_t* out, int64_t out_stride) {
    for (int64_t word = 0; word < 4; ++word)
      for (int64_t row = 0; row < lanes; ++row) out[word * out_stride + row] = static_cast<uint32_t>(p[row * stride + word]);
  }
};
#endif

}  // namespace BITDELTA_ISA
}  // namespace bitdelta
