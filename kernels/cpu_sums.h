// How signed sums of a row are tabulated and looked up: `ExactSums` in fp32, `RoundedSums` in 16 bits.
//
// A group of consecutive features (4; 3 under AVX2) has few signed sums, which fit one register. They are tabulated once per
// row of x, and from then on a group's weights of many outputs cost one in-register permute and one addition.
#pragma once

#include "cpu_delta.h"

namespace bitdelta {
inline namespace BITDELTA_ISA {

// Tables of fp32. All arithmetic is fp32; x holding inf or NaN gives what the dense product gives.
struct ExactSums {
  static constexpr int64_t entries = int64_t(1) << Lanes::bits;                   // sums of one group
  static constexpr int64_t groups = (kWordBits + Lanes::bits - 1) / Lanes::bits;  // groups of one word
  static constexpr int64_t word_table = groups * entries;
  static constexpr int64_t block_words = 16;  // words summed before the row scale
  static constexpr int64_t held = 16;         // blocks of tables that a tile holds

  struct Block {
    alignas(64) float at[block_words * word_table];
  };

  // Before the words of a block are tabulated.  x: fp32 [count, 32], may be changed.
  static BITDELTA_INLINE void begin(float*, int64_t, Block&) {}

  // table.at[word][group][entry]: entry bit i set means +x[group start + i].  x: the word's 32 features.
  static BITDELTA_INLINE void tabulate(const float* x, int64_t word, Block& block) {
    using Float = Lanes::Float;
    float* const table = block.at + word * word_table;
    alignas(64) float sign[Lanes::bits][entries];
    for (int64_t i = 0; i < Lanes::bits; ++i)
      for (int64_t entry = 0; entry < entries; ++entry) sign[i][entry] = (entry >> i & 1) != 0 ? 1.0f : -1.0f;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t entry = 0; entry < entries; entry += Lanes::lanes) {
        Float sum = Lanes::zero();
        for (int64_t i = 0; i < Lanes::bits; ++i) {
          const int64_t k = group * Lanes::bits + i;
          if (k < kWordBits) sum = Lanes::fma(Lanes::load(sign[i] + entry), Lanes::broadcast(x[k]), sum);
        }
        Lanes::store(table + group * entries + entry, sum);
      }
  }

  // y[r][n] += row_scale[n] * (sum over the block) for R rows and kBlockN outputs; row r's table is tables[r * stride].
  template <int64_t R>
  static inline void look_up(const Bits& bits, int64_t count, const Block* tables, int64_t stride, const float* row_scale, Ahead* ahead, float* y,
                             int64_t ldy) {
    constexpr int64_t B = Lanes::blocks, L = Lanes::lanes;
    typename Lanes::Float sum[R][B], one = Lanes::broadcast(1.0f);
#if defined(__GNUC__) && !defined(BITDELTA_PORTABLE)
    __asm__("" : "+v"(one));  // or the compiler would turn the multiplication back into an addition
#endif
    for (int64_t r = 0; r < R; ++r)
      for (int64_t b = 0; b < B; ++b) sum[r][b] = Lanes::zero();
    for (int64_t word = 0; word < count; ++word) {
      if (ahead != nullptr) ahead->fetch(kLinesPerWord);
      typename Lanes::Words v[B];
      for (int64_t b = 0; b < B; ++b) v[b] = Lanes::load_words(bits.at + word * kBlockN + b * L);
#if defined(__GNUC__)
#pragma GCC unroll 1  // unrolled, gcc's scheduler hoists the lookups until the registers spill: half the speed
#endif
      for (int64_t group = 0; group < groups; ++group) {
        for (int64_t r = 0; r < R; ++r) {
          const float* sums = tables[r * stride].at + word * word_table + group * entries;
#if defined(BITDELTA_PORTABLE)
          const float* table = sums;
#else
          const typename Lanes::Float table = Lanes::load(sums);
#endif
          for (int64_t b = 0; b < B; ++b) sum[r][b] = Lanes::add(Lanes::lookup(table, v[b]), sum[r][b], one);
        }
        for (int64_t b = 0; b < B; ++b) v[b] = Lanes::next_group(v[b]);
      }
    }
    for (int64_t r = 0; r < R; ++r)
      for (int64_t b = 0; b < B; ++b) {
        float* to = y + r * ldy + b * L;
        Lanes::store(to, Lanes::fma(Lanes::load(row_scale + b * L), sum[r][b], Lanes::load(to)));
      }
  }
};

#if defined(BITDELTA_AVX512)
// Tables of 16-bit integers: twice the lookups per instruction. The sums of a block share a step, a 1023rd of the largest, so that
// 32 of them fit 16 bits; the error is that of rounding the delta's part of the output to bf16. A step of inf or NaN carries
// infinite and NaN features into the result.
//
// A permute of 32 lanes of 16 bits sees the halves of 16 sign words. It serves both at once: entries 0 to 15 are sums of the lower
// half's group, 16 to 31 of the upper half's.
struct RoundedSums {
  static constexpr int64_t half_groups = 4;  // groups of each half of a word
  static constexpr int64_t word_table = half_groups * 32;
  static constexpr int64_t block_words = 8;  // 32 lookups in every lane
  static constexpr int64_t held = 64;
  static constexpr float largest_entry = 1023.0f;  // 32 of them are below 2^15

  struct Block {
    alignas(64) int16_t at[block_words * word_table];
    float step;
  };

  static inline void begin(float* x, int64_t count, Block& block) {
    __m512 largest = _mm512_setzero_ps();
    __m512i top = _mm512_setzero_si512();
    for (int64_t k = 0; k < count * kWordBits; k += 16) {
      const __m512 size = _mm512_abs_ps(_mm512_loadu_ps(x + k));
      const __m512 pairs = _mm512_add_ps(size, _mm512_permute_ps(size, 0xb1));
      largest = _mm512_max_ps(largest, _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4e)));
      top = _mm512_max_epi32(top, _mm512_castps_si512(size));
    }
    const float sum = _mm512_reduce_max_ps(largest), inf = std::numeric_limits<float>::infinity();
    const int32_t highest = _mm512_reduce_max_epi32(top), infinite = 0x7f800000;
    float inverse = largest_entry / sum;
    block.step = sum / largest_entry;
    if (highest == infinite) {
      for (int64_t k = 0; k < count * kWordBits; ++k) x[k] = std::isinf(x[k]) ? std::copysign(1.0f, x[k]) : 0.0f;
      inverse = 1.0f, block.step = inf;
    } else if (highest > infinite) {
      inverse = 0.0f, block.step = std::numeric_limits<float>::quiet_NaN();
    } else if (!(inverse < inf)) {
      inverse = block.step = 0.0f;
    }
    for (int64_t k = 0; k < count * kWordBits; k += 16) _mm512_storeu_ps(x + k, _mm512_mul_ps(_mm512_loadu_ps(x + k), _mm512_set1_ps(inverse)));
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
#else
using RoundedSums = ExactSums;  // no permute of 16-bit lanes
#endif

}  // namespace BITDELTA_ISA
}  // namespace bitdelta
