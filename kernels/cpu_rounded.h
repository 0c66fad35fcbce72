// How signed sums of a row are tabulated and looked up in 16 bits: `RoundedSums`, as `ExactSums` (cpu_sums.h) in fp32.
//
// The sums of a block share a step, a 1023rd of the largest, so that 32 of them fit 16 bits; the error is that of rounding the
// delta's part of the output to bf16. A step of inf or NaN carries infinite and NaN features into the result. Every instruction
// set that has this form adds the same integers and gives the same results, bit for bit.
#pragma once

#include "cpu_sums.h"

namespace bitdelta {
inline namespace BITDELTA_ISA {

#if !defined(BITDELTA_PORTABLE)
static constexpr float kLargestEntry = 1023.0f;

// Expresses the features of a block in its step, which is returned.
//   x: fp32 [features].  largest: greatest sum of the sizes of 4 features of a group.  top: greatest size, as bits.
static inline float quantize(float* x, int64_t features, float largest, int32_t top) {
  constexpr int32_t infinite = 0x7f800000;
  constexpr float inf = std::numeric_limits<float>::infinity();
  float inverse = kLargestEntry / largest, step = largest / kLargestEntry;
  if (top == infinite) {
    for (int64_t k = 0; k < features; ++k) x[k] = std::isinf(x[k]) ? std::copysign(1.0f, x[k]) : 0.0f;
    inverse = 1.0f, step = inf;
  } else if (top > infinite) {
    inverse = 0.0f, step = std::numeric_limits<float>::quiet_NaN();
  } else if (!(inverse < inf)) {
    inverse = step = 0.0f;
  }
#pragma omp simd
  for (int64_t k = 0; k < features; ++k) x[k] *= inverse;
  return step;
}
#endif

#if defined(BITDELTA_AVX512)
// A permute of 32 lanes of 16 bits, twice the lookups per instruction, sees the halves of 16 sign words. It serves both at once:
// entries 0 to 15 are sums of the lower half's group, 16 to 31 of the upper half's.
struct RoundedSums {
  static constexpr int64_t half_groups = 4;  // groups of each half of a word
  static constexpr int64_t word_table = half_groups * 32;
  static constexpr int64_t block_words = 8;  // 32 lookups in every lane
  static constexpr int64_t held = 64;
  static constexpr int64_t rows = 4;

  struct Block {
    alignas(64) int16_t at[block_words * word_table];
    float step;
  };

  static BITDELTA_INLINE void arrange(const int32_t* p, int64_t stride, int64_t word, Bits& bits) { transpose_block(p, stride, word, bits); }

  static inline void begin(float* x, int64_t count, Block& block) {
    __m512 largest = _mm512_setzero_ps();
    __m512i top = _mm512_setzero_si512();
    for (int64_t k = 0; k < count * kWordBits; k += 16) {
      const __m512 size = _mm512_abs_ps(_mm512_loadu_ps(x + k));
      const __m512 pairs = _mm512_add_ps(size, _mm512_permute_ps(size, 0xb1));
      largest = _mm512_max_ps(largest, _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4e)));
      top = _mm512_max_epi32(top, _mm512_castps_si512(size));
    }
    block.step = quantize(x, count * kWordBits, _mm512_reduce_max_ps(largest), _mm512_reduce_max_epi32(top));
  }

  // The 16 signed sums of 4 features.
  static BITDELTA_INLINE __m512i group_sums(const float* x, const __m512* sign) {
    __m512 sum = _mm512_mul_ps(_mm512_set1_ps(x[0]), sign[0]);
    for (int64_t i = 1; i < 4; ++i) sum = _mm512_fmadd_ps(_mm512_set1_ps(x[i]), sign[i], sum);
    return _mm512_cvtps_epi32(sum);
  }

  static BITDELTA_INLINE void tabulate(const float* x, int64_t word, Block& block) {
    const __m512 one = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-1.0f);
    const __m512 sign[4] = {_mm512_mask_blend_ps(0xaaaa, minus, one), _mm512_mask_blend_ps(0xcccc, minus, one),
                            _mm512_mask_blend_ps(0xf0f0, minus, one), _mm512_mask_blend_ps(0xff00, minus, one)};
    alignas(64) static constexpr int16_t low_halves[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                           32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    const __m512i order = _mm512_load_si512(low_halves);
    int16_t* to = block.at + word * word_table;
    for (int64_t group = 0; group < half_groups; ++group, to += 32) {
      const __m512i lower = group_sums(x + group * 4, sign), upper = group_sums(x + 16 + group * 4, sign);
      _mm512_store_si512(to, _mm512_permutex2var_epi16(lower, order, upper));
    }
  }

  template <int64_t R>
  static inline void look_up(const Bits& bits, int64_t count, const Block* tables, int64_t stride, const float* row_scale, Ahead* ahead, float* y,
                             int64_t ldy) {
    constexpr int64_t B = Lanes::blocks, L = Lanes::lanes;
    const __m512i four_bits = _mm512_set1_epi32(0x000f000f), upper = _mm512_set1_epi32(0x00100000);
    __m512i sum[R][B];
    for (int64_t r = 0; r < R; ++r)
      for (int64_t b = 0; b < B; ++b) sum[r][b] = _mm512_setzero_si512();
    for (int64_t word = 0; word < count; ++word) {
      if (ahead != nullptr) ahead->fetch(kLinesPerWord);
      __m512i v[B];
      for (int64_t b = 0; b < B; ++b) v[b] = Lanes::load_words(bits.at + word * kBlockN + b * L);
#if defined(__GNUC__)
#pragma GCC unroll 1
#endif
      for (int64_t group = 0; group < half_groups; ++group) {
        __m512i entry[B];
        for (int64_t b = 0; b < B; ++b) {
          entry[b] = _mm512_ternarylogic_epi32(v[b], four_bits, upper, 0xea);  // (v & four_bits) | upper
          v[b] = _mm512_srli_epi32(v[b], 4);
        }
        for (int64_t r = 0; r < R; ++r) {
          const __m512i table = _mm512_load_si512(tables[r * stride].at + word * word_table + group * 32);
          for (int64_t b = 0; b < B; ++b) sum[r][b] = _mm512_add_epi16(sum[r][b], _mm512_permutexvar_epi16(entry[b], table));
        }
      }
    }
    for (int64_t r = 0; r < R; ++r) {
      const __m512 step = _mm512_set1_ps(tables[r * stride].step);
      for (int64_t b = 0; b < B; ++b) {
        const __m512i lower_half = _mm512_srai_epi32(_mm512_slli_epi32(sum[r][b], 16), 16), upper_half = _mm512_srai_epi32(sum[r][b], 16);
        const __m512 total = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(lower_half, upper_half)), step);
        float* to = y + r * ldy + b * L;
        _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(row_scale + b * L), total, _mm512_loadu_ps(to)));
      }
    }
  }
};
#elif defined(BITDELTA_AVX2)
// A shuffle looks 32 bytes up in a table of 16, so they must be of one group: signs are arranged as 4 bits each of 32 outputs. The
// sums, made positive, have 11 bits; the low 6 and the high 5 are tables of their own. As many lookups as fit a byte (4 and 8)
// are added as bytes, and only then in 16 bits.
struct RoundedSums {
  static constexpr int64_t entries = 16, groups = 8;
  static constexpr int64_t word_table = groups * 2 * entries;
  static constexpr int64_t block_words = 8;
  static constexpr int64_t held = 64;
  static constexpr int64_t rows = 2;
  static constexpr int32_t bias = 1024, low_bits = 6;

  struct Block {
    alignas(64) uint8_t at[block_words * word_table];  // [word][group][low or high][entry]
    float step;
  };

  static BITDELTA_INLINE __m256i* entries_of(Bits& bits, int64_t word) { return reinterpret_cast<__m256i*>(bits.at) + word * groups; }

  // Bytes of four sign words of row 0, 16, 1 and 17 from p, four of each word together; and of the rows 4 after these.
  static BITDELTA_INLINE void interleave(const int32_t* p, int64_t stride, __m256i* word) {
    const __m256i a = Lanes::half_rows(p, stride), b = Lanes::half_rows(p + 16 * stride, stride);
    const __m256i c = Lanes::half_rows(p + stride, stride), d = Lanes::half_rows(p + 17 * stride, stride);
    const __m256i ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
    const __m256i cd0 = _mm256_unpacklo_epi8(c, d), cd1 = _mm256_unpackhi_epi8(c, d);
    word[0] = _mm256_unpacklo_epi16(ab0, cd0), word[1] = _mm256_unpackhi_epi16(ab0, cd0);
    word[2] = _mm256_unpacklo_epi16(ab1, cd1), word[3] = _mm256_unpackhi_epi16(ab1, cd1);
  }

  // entries_of(bits, word)[group]: a byte per output with the group's bits, ordered so that `look_up` ends with outputs in theirs.
  static BITDELTA_INLINE void arrange(const int32_t* p, int64_t stride, int64_t word, Bits& bits) {
    static_assert(kBlockN == 32 && block_words * groups * 32 <= static_cast<int64_t>(sizeof bits.at));
    const __m256i four_bits = _mm256_set1_epi8(15);
    __m256i from[4][4];
    interleave(p, stride, from[0]), interleave(p + 2 * stride, stride, from[1]);
    interleave(p + 8 * stride, stride, from[2]), interleave(p + 10 * stride, stride, from[3]);
    for (int64_t w = 0; w < 4; ++w) {
      const __m256i ab0 = _mm256_unpacklo_epi32(from[0][w], from[1][w]), ab1 = _mm256_unpackhi_epi32(from[0][w], from[1][w]);
      const __m256i cd0 = _mm256_unpacklo_epi32(from[2][w], from[3][w]), cd1 = _mm256_unpackhi_epi32(from[2][w], from[3][w]);
      const __m256i bytes[4] = {_mm256_unpacklo_epi64(ab0, cd0), _mm256_unpackhi_epi64(ab0, cd0), _mm256_unpacklo_epi64(ab1, cd1),
                                _mm256_unpackhi_epi64(ab1, cd1)};
      __m256i* const to = entries_of(bits, word + w);
      for (int64_t byte = 0; byte < 4; ++byte) {
        _mm256_store_si256(to + 2 * byte, _mm256_and_si256(bytes[byte], four_bits));
        _mm256_store_si256(to + 2 * byte + 1, _mm256_and_si256(_mm256_srli_epi16(bytes[byte], 4), four_bits));
      }
    }
  }

  static inline void begin(float* x, int64_t count, Block& block) {
    __m256 largest = _mm256_setzero_ps();
    __m256i top = _mm256_setzero_si256();
    for (int64_t k = 0; k < count * kWordBits; k += 8) {
      const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(x + k));
      const __m256 pairs = _mm256_add_ps(size, _mm256_permute_ps(size, 0xb1));
      largest = _mm256_max_ps(largest, _mm256_add_ps(pairs, _mm256_permute_ps(pairs, 0x4e)));
      top = _mm256_max_epi32(top, _mm256_castps_si256(size));
    }
    alignas(32) float sums[8];
    alignas(32) int32_t tops[8];
    _mm256_store_ps(sums, largest), _mm256_store_si256(reinterpret_cast<__m256i*>(tops), top);
    block.step = quantize(x, count * kWordBits, *std::max_element(sums, sums + 8), *std::max_element(tops, tops + 8));
  }

  static BITDELTA_INLINE void tabulate(const float* x, int64_t word, Block& block) {
    const __m256 sign[3] = {_mm256_setr_ps(-1, 1, -1, 1, -1, 1, -1, 1), _mm256_setr_ps(-1, -1, 1, 1, -1, -1, 1, 1),
                            _mm256_setr_ps(-1, -1, -1, -1, 1, 1, 1, 1)};
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    uint8_t* to = block.at + word * word_table;
    for (int64_t group = 0; group < groups; ++group, x += 4, to += 2 * entries) {
      __m256 sum = _mm256_mul_ps(_mm256_set1_ps(x[0]), sign[0]);
      for (int64_t i = 1; i < 3; ++i) sum = _mm256_fmadd_ps(_mm256_set1_ps(x[i]), sign[i], sum);
      const __m256 last = _mm256_set1_ps(x[3]);
      const __m256i minus = _mm256_cvtps_epi32(_mm256_sub_ps(sum, last)), plus = _mm256_cvtps_epi32(_mm256_add_ps(sum, last));
      const __m256i positive = _mm256_add_epi16(_mm256_packs_epi32(minus, plus), _mm256_set1_epi16(bias));
      const __m256i low = _mm256_and_si256(positive, _mm256_set1_epi16((1 << low_bits) - 1)), high = _mm256_srli_epi16(positive, low_bits);
      const __m256i both = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), both);
    }
  }

  // Sums of bytes: of those at even places and of those at odd places, 16 bits each.
  struct ByteSums {
    __m256i all = _mm256_setzero_si256();  // even + 256 * odd
    __m256i odd = _mm256_setzero_si256();

    BITDELTA_INLINE void add(__m256i bytes) {
      all = _mm256_add_epi16(all, bytes);
      odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
    }
    BITDELTA_INLINE __m256i even() const { return _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8)); }
  };

  template <int64_t R>
  static inline void look_up(const Bits& bits, int64_t count, const Block* tables, int64_t stride, const float* row_scale, Ahead* ahead, float* y,
                             int64_t ldy) {
    const auto table = [](const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p))); };
    ByteSums low[R], high[R];
    for (int64_t word = 0; word < count; ++word) {
      if (ahead != nullptr) ahead->fetch(kLinesPerWord);
      const __m256i* entry = reinterpret_cast<const __m256i*>(bits.at) + word * groups;
      __m256i high_bytes[R];
      for (int64_t r = 0; r < R; ++r) high_bytes[r] = _mm256_setzero_si256();
      for (int64_t half = 0; half < 2; ++half) {
        __m256i low_bytes[R];
        for (int64_t r = 0; r < R; ++r) low_bytes[r] = _mm256_setzero_si256();
        for (int64_t group = half * 4; group < half * 4 + 4; ++group) {
          const __m256i at = _mm256_load_si256(entry + group);
          for (int64_t r = 0; r < R; ++r) {
            const uint8_t* sums = tables[r * stride].at + word * word_table + group * 2 * entries;
            low_bytes[r] = _mm256_add_epi8(low_bytes[r], _mm256_shuffle_epi8(table(sums), at));
            high_bytes[r] = _mm256_add_epi8(high_bytes[r], _mm256_shuffle_epi8(table(sums + entries), at));
          }
        }
        for (int64_t r = 0; r < R; ++r) low[r].add(low_bytes[r]);
      }
      for (int64_t r = 0; r < R; ++r) high[r].add(high_bytes[r]);
    }
    const __m256i weights = _mm256_set1_epi32(1 << low_bits << 16 | 1), biases = _mm256_set1_epi32(static_cast<int32_t>(count * groups) * bias);
    for (int64_t r = 0; r < R; ++r) {
      const __m256 step = _mm256_set1_ps(tables[r * stride].step);
      const auto add = [&](int64_t n, __m256i pairs) {
        const __m256i sum = _mm256_sub_epi32(_mm256_madd_epi16(pairs, weights), biases);
        const __m256 total = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), step);
        float* to = y + r * ldy + n;
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_loadu_ps(row_scale + n), total, _mm256_loadu_ps(to)));
      };
      const __m256i low_even = low[r].even(), high_even = high[r].even();
      add(0, _mm256_unpacklo_epi16(low_even, high_even)), add(8, _mm256_unpackhi_epi16(low_even, high_even));
      add(16, _mm256_unpacklo_epi16(low[r].odd, high[r].odd)), add(24, _mm256_unpackhi_epi16(low[r].odd, high[r].odd));
    }
  }
};
#else
using RoundedSums = ExactSums;  // no permute in a register
#endif

}  // namespace BITDELTA_ISA
}  // namespace bitdelta
