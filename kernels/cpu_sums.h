// How signed sums of a row are tabulated and looked up in fp32: `ExactSums`.
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
#if defined(BITDELTA_AVX512)
  static constexpr int64_t rows = 4;  // rows of x looked up together, at most: more spill registers
#else
  static constexpr int64_t rows = 1;
#endif

  struct Block {
    alignas(64) float at[block_words * word_table];
  };

  // Four sign words of kBlockN rows, `stride` words apart, as `look_up` reads them, at words [word, word + 4) of the block.
  static BITDELTA_INLINE void arrange(const int32_t* p, int64_t stride, int64_t word, Bits& bits) { transpose_block(p, stride, word, bits); }

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

}  // namespace BITDELTA_ISA
}  // namespace bitdelta
