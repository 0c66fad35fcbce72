// The device function of the CPU delta op: `delta_tile`, an output tile of
//
//     y[m, n] = sum_p row_scale[p, n] * sum_k sign[p, n, k] * col_scale[p, k] * x[m, k]
//
// from canonical sign words (kernels/layout.py: int32 [P, N, W], bit j of word w is feature 32 w + j, 1 is +1, 0 is -1).
//
// Method. A group of G consecutive features (4; 3 under AVX2) has 2^G signed sums, which fit one register. They are
// tabulated once per row of x, and from then on G weights cost one in-register permute and one fp32 add. Bits of 4 words
// by `lanes` outputs are transposed so that a lane is an output; any number of rows then looks up the same bits. No
// unpacked weights, no multiplications by +-1. All arithmetic is fp32, whatever T is. x holding inf or NaN gives what the
// dense product gives.
//
// Order of arithmetic. y[m, n] is a chain over blocks of kBlockK features, then planes, of fma(row_scale, sum over the
// block). It depends on nothing else: any split over n or rows, any company of other rows give the same bits.
//
// Use: for every block of kRows rows of one tenant, for every range [n0, n1) of tile_outputs(...),
//     delta_tile(Delta{signs, row_scale, planes, N, K}, col_scale_or_null, x, K, 1, index_or_null, rows, n0, n1, y, ldy)
//
// The including code may define BITDELTA_AVX512, BITDELTA_AVX2 or BITDELTA_PORTABLE as 1; otherwise the compiler's
// target decides.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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
  static constexpr int64_t lanes = 16, bits = 4, blocks = 4, rows = 4;

  static BITDELTA_INLINE Float zero() { return _mm512_setzero_ps(); }
  static BITDELTA_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
  static BITDELTA_INLINE void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static BITDELTA_INLINE Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static BITDELTA_INLINE Float ones() { return _mm512_set1_ps(1.0f); }
  static BITDELTA_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  // a + b. As a multiplication by 1 it runs beside the shuffles, where an addition would compete with them for ports (Zen 4).
  static BITDELTA_INLINE Float add(Float a, Float b, Float one) { return _mm512_fmadd_ps(a, one, b); }
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
  static constexpr int64_t lanes = 8, bits = 3, blocks = 4, rows = 2;

  static BITDELTA_INLINE Float zero() { return _mm256_setzero_ps(); }
  static BITDELTA_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
  static BITDELTA_INLINE void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static BITDELTA_INLINE Words load_words(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static BITDELTA_INLINE Float ones() { return _mm256_set1_ps(1.0f); }
  static BITDELTA_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  // a + b. As a multiplication by 1 it runs beside the shuffles, where an addition would compete with them for ports (Zen 4).
  static BITDELTA_INLINE Float add(Float a, Float b, Float one) { return _mm256_fmadd_ps(a, one, b); }
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
  static constexpr int64_t lanes = 4, bits = 4, blocks = 2, rows = 1;
  struct Float { float at[lanes]; };
  struct Words { uint32_t at[lanes]; };

  static BITDELTA_INLINE Float zero() { return Float{}; }
  static BITDELTA_INLINE Float load(const float* p) { Float v; std::memcpy(v.at, p, sizeof v); return v; }
  static BITDELTA_INLINE void store(float* p, Float v) { std::memcpy(p, v.at, sizeof v); }
  static BITDELTA_INLINE Words load_words(const uint32_t* p) { Words v; std::memcpy(v.at, p, sizeof v); return v; }
  static BITDELTA_INLINE Float ones() { return Float{}; }
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

// Sizes.

static constexpr int64_t kWordBits = 32;
static constexpr int64_t kEntries = int64_t(1) << Lanes::bits;                              // sums of one group
static constexpr int64_t kGroups = (kWordBits + Lanes::bits - 1) / Lanes::bits;             // groups of one word
static constexpr int64_t kWordTable = kGroups * kEntries;                                   // floats tabulated for one word
static constexpr int64_t kBlockN = Lanes::lanes * Lanes::blocks;                            // outputs of one inner step
static constexpr int64_t kBlockWords = 16;
static constexpr int64_t kBlockK = kBlockWords * kWordBits;                                 // features summed before the row scale
static constexpr int64_t kAhead = 2;                                                         // blocks from the signs in use to those prefetched
static constexpr int64_t kRows = 16;  // rows looked up per pass over the signs

static inline int64_t words(int64_t features) { return (features + kWordBits - 1) / kWordBits; }

// Outputs per tile: wide enough that tabulating x is lost in the lookups, small enough to stay in the caches and to give
// every thread a tile.
static inline int64_t tile_outputs(int64_t N, int64_t row_tiles, int64_t threads) {
  const int64_t steps = (N + kBlockN - 1) / kBlockN;
  const int64_t shares = std::max<int64_t>(1, (threads + row_tiles - 1) / std::max<int64_t>(row_tiles, 1));
  const int64_t wanted = std::max<int64_t>(1, (steps + shares - 1) / shares) * kBlockN;
  return row_tiles > 1 ? std::min<int64_t>(wanted, 1024) : wanted;
}

// One slot of one parameter's bank.
struct Delta {
  const int32_t* signs;    // [P, N, W]
  const float* row_scale;  // [P, N]
  int64_t planes, N, K;
};

// Preparation of x.

// x[k] * col_scale[k] as fp32 for k in [k0, k0 + count), zeros up to the next whole word. Reads nothing past k0 + count.
template <typename T>
static inline void widen(const T* x, int64_t stride, const float* col_scale, int64_t k0, int64_t count, float* out) {
  const T* from = x + k0 * stride;
  if (stride == 1) {
    for (int64_t k = 0; k < count; ++k) out[k] = static_cast<float>(from[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) out[k] = static_cast<float>(from[k * stride]);
  }
  if (col_scale != nullptr) {
    for (int64_t k = 0; k < count; ++k) out[k] *= col_scale[k0 + k];
  }
  for (int64_t k = count; k < words(count) * kWordBits; ++k) out[k] = 0.0f;
}

// The signed sums of every group of `count` words of features: table[word][group][entry], entry bit i set means +x[group start + i].
static inline void tabulate(const float* x, int64_t count, float* table) {
  float sign[Lanes::bits][kEntries];
  for (int64_t i = 0; i < Lanes::bits; ++i)
    for (int64_t entry = 0; entry < kEntries; ++entry) sign[i][entry] = (entry >> i & 1) != 0 ? 1.0f : -1.0f;
  for (int64_t word = 0; word < count; ++word) {
    for (int64_t group = 0; group < kGroups; ++group) {
      float* out = table + word * kWordTable + group * kEntries;
      float value[Lanes::bits];
      for (int64_t i = 0; i < Lanes::bits; ++i) {
        const int64_t k = group * Lanes::bits + i;
        value[i] = k < kWordBits ? x[word * kWordBits + k] : 0.0f;
      }
      for (int64_t entry = 0; entry < kEntries; ++entry) {
        float sum = sign[0][entry] * value[0];
        for (int64_t i = 1; i < Lanes::bits; ++i) sum += sign[i][entry] * value[i];
        out[entry] = sum;
      }
    }
  }
}

// Lookups.

// Sign words of one block, a lane per output: [kBlockWords][kBlockN].
struct Bits {
  alignas(64) uint32_t at[kBlockWords * kBlockN];
};

// The signs to be read next, fetched into L2 a few lines at a time while others are looked up: all at once they overrun the miss
// buffers and the processor drops them. An address, not a pointer: it may lie past the end.
struct Next {
  uintptr_t at;    // 0: nothing
  int64_t stride;  // bytes from row to row

  BITDELTA_INLINE void fetch(int64_t word) const {
    constexpr int64_t each = (kBlockN + kBlockWords - 1) / kBlockWords;
    if (at == 0) return;
    for (int64_t row = word * each; row < std::min((word + 1) * each, kBlockN); ++row) BITDELTA_PREFETCH(at + static_cast<uintptr_t>(row * stride));
  }
};

// Transposes `count` words of `outputs` rows of signs; absent outputs get zeros.
static inline void load_bits(const int32_t* signs, int64_t W, int64_t count, int64_t outputs, Bits& bits) {
  for (int64_t row = 0; row < kBlockN; row += Lanes::lanes) {
    for (int64_t word = 0; word < count; word += 4) {
      uint32_t* out = bits.at + word * kBlockN + row;
      if (row + Lanes::lanes <= outputs && word + 4 <= count) {
        Lanes::transpose(signs + row * W + word, W, out, kBlockN);
      } else {
        int32_t copy[Lanes::lanes * 4] = {};
        for (int64_t r = 0; r < std::min(Lanes::lanes, outputs - row); ++r)
          for (int64_t w = 0; w < std::min<int64_t>(4, count - word); ++w) copy[r * 4 + w] = signs[(row + r) * W + word + w];
        Lanes::transpose(copy, 4, out, kBlockN);
      }
    }
  }
}

// y[r][n] += row_scale[n] * (sum over the block) for R rows and kBlockN outputs.
template <int64_t R>
static inline void look_up(const Bits& bits, int64_t count, const float* const* tables, const float* row_scale, Next next, float* y, int64_t ldy) {
  constexpr int64_t B = Lanes::blocks, L = Lanes::lanes;
  typename Lanes::Float sum[R][B], one = Lanes::ones();
#if defined(__GNUC__) && !defined(BITDELTA_PORTABLE)
  __asm__("" : "+v"(one));  // or the compiler would turn the multiplication back into an addition
#endif
  for (int64_t r = 0; r < R; ++r)
    for (int64_t b = 0; b < B; ++b) sum[r][b] = Lanes::zero();
  for (int64_t word = 0; word < count; ++word) {
    next.fetch(word);
    typename Lanes::Words v[B];
    for (int64_t b = 0; b < B; ++b) v[b] = Lanes::load_words(bits.at + word * kBlockN + b * L);
#if defined(__GNUC__)
#pragma GCC unroll 1  // unrolled, gcc's scheduler hoists the lookups until the registers spill: half the speed
#endif
    for (int64_t group = 0; group < kGroups; ++group) {
      for (int64_t r = 0; r < R; ++r) {
        const float* entries = tables[r] + word * kWordTable + group * kEntries;
#if defined(BITDELTA_PORTABLE)
        const float* table = entries;
#else
        const typename Lanes::Float table = Lanes::load(entries);
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

// All rows (at most kRows), in the widest steps that fit the registers.
static inline void look_up_whole(const Bits& bits, int64_t count, const float* const* tables, int64_t rows, const float* row_scale, Next next, float* y,
                                 int64_t ldy) {
  int64_t r = 0;
  if constexpr (Lanes::rows >= 4) {
    for (; r + 4 <= rows; r += 4) look_up<4>(bits, count, tables + r, row_scale, r == 0 ? next : Next{0, 0}, y + r * ldy, ldy);
  }
  if constexpr (Lanes::rows >= 2) {
    for (; r + 2 <= rows; r += 2) look_up<2>(bits, count, tables + r, row_scale, r == 0 ? next : Next{0, 0}, y + r * ldy, ldy);
  }
  for (; r < rows; ++r) look_up<1>(bits, count, tables + r, row_scale, r == 0 ? next : Next{0, 0}, y + r * ldy, ldy);
}

// The same for any outputs [n, n + outputs) of one block. Where the block is not whole, in a padded copy: the same instructions, hence
// the same results.
static inline void look_up_rows(const Delta& d, const Bits& bits, int64_t count, const float* const* tables, int64_t rows, int64_t plane, int64_t n,
                                int64_t outputs, Next next, float* y, int64_t ldy) {
  const float* row_scale = d.row_scale + plane * d.N + n;
  if (outputs == kBlockN) {
    look_up_whole(bits, count, tables, rows, row_scale, next, y, ldy);
    return;
  }
  float scale[kBlockN] = {};
  float copy[kRows * kBlockN] = {};
  std::copy(row_scale, row_scale + outputs, scale);
  for (int64_t r = 0; r < rows; ++r) std::copy(y + r * ldy, y + r * ldy + outputs, copy + r * kBlockN);
  look_up_whole(bits, count, tables, rows, scale, next, copy, kBlockN);
  for (int64_t r = 0; r < rows; ++r) std::copy(copy + r * kBlockN, copy + r * kBlockN + outputs, y + r * ldy);
}

// Tiles.

// Adds one block of features, starting at `word`, of one plane to y[i, n - n0] for n in [n0, n1).
static inline void add_block(const Delta& d, int64_t plane, int64_t word, const float* const* tables, int64_t rows, int64_t n0, int64_t n1,
                             float* y, int64_t ldy) {
  const int64_t W = words(d.K), count = std::min(kBlockWords, W - word);
  const auto address = [&](int64_t n, int64_t w) { return reinterpret_cast<uintptr_t>(d.signs) + static_cast<uintptr_t>(((plane * d.N + n) * W + w) * 4); };
  Bits bits;
  for (int64_t n = n0; n < n1; n += kBlockN) {
    Next next{0, W * 4};
    const int64_t later = n + kAhead * kBlockN, wrapped = later - (n1 - n0 + kBlockN - 1) / kBlockN * kBlockN;
    if (later < n1) next.at = address(later, word);
    else if (word + count < W) next.at = address(std::max(n0, wrapped), word + count);
    load_bits(d.signs + (plane * d.N + n) * W + word, W, count, std::min(kBlockN, n1 - n), bits);
    look_up_rows(d, bits, count, tables, rows, plane, n, std::min(kBlockN, n1 - n), next, y + n - n0, ldy);
  }
}

static inline void clear(int64_t rows, int64_t outputs, float* y, int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r) std::fill(y + r * ldy, y + r * ldy + outputs, 0.0f);
}

// y[i, n - n0] for n in [n0, n1) and `rows` rows of x of one tenant, overwritten.
//   x: T, element k of row m at x[m * row_stride + k * stride].  index: the rows' numbers m, or null for 0, 1, ... rows - 1.
//   col_scale: fp32 [P, K], or null.  Takes 130 KB of stack.
template <typename T, typename Index = int64_t>
static inline void delta_tile(const Delta& d, const float* col_scale, const T* x, int64_t row_stride, int64_t stride, const Index* index, int64_t rows,
                             int64_t n0, int64_t n1, float* y, int64_t ldy) {
  alignas(64) float table[kRows * kBlockWords * kWordTable];
  float wide[kBlockK];
  const float* part[kRows];
  for (int64_t i = 0; i < kRows; ++i) part[i] = table + i * kBlockWords * kWordTable;
  clear(rows, n1 - n0, y, ldy);
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t some = std::min(kRows, rows - first);
    for (int64_t word = 0; word < words(d.K); word += kBlockWords) {
      const int64_t k = word * kWordBits, count = std::min(kBlockK, d.K - k);
      for (int64_t plane = 0; plane < d.planes; ++plane) {
        if (plane == 0 || col_scale != nullptr) {
          for (int64_t i = 0; i < some; ++i) {
            const int64_t m = index != nullptr ? static_cast<int64_t>(index[first + i]) : first + i;
            widen(x + m * row_stride, stride, col_scale != nullptr ? col_scale + plane * d.K : nullptr, k, count, wide);
            tabulate(wide, words(count), table + i * kBlockWords * kWordTable);
          }
        }
        add_block(d, plane, word, part, some, n0, n1, y + first * ldy, ldy);
      }
    }
  }
}

}  // namespace BITDELTA_ISA
}  // namespace bitdelta
