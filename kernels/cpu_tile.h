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
// block). It depends on nothing else: any split over n or rows, any company of other rows give the same bits. A plane whose
// scales are all zero in a block of kBlockN outputs is absent there: it adds nothing and its signs are not read.
//
// Use: for every block of kRows rows of one tenant, for every range [n0, n1) of tile_outputs(...),
//     delta_tile(Delta{signs, row_scale, planes, N, K}, col_scale_or_null, x, K, 1, index_or_null, rows, n0, n1, y, ldy)
#pragma once

#include "cpu_lanes.h"

namespace bitdelta {
inline namespace BITDELTA_ISA {

// Sizes.

static constexpr int64_t kWordBits = 32;
static constexpr int64_t kEntries = int64_t(1) << Lanes::bits;                      // sums of one group
static constexpr int64_t kGroups = (kWordBits + Lanes::bits - 1) / Lanes::bits;     // groups of one word
static constexpr int64_t kWordTable = kGroups * kEntries;                           // floats tabulated for one word
static constexpr int64_t kBlockN = Lanes::lanes * Lanes::blocks;                    // outputs of one inner step
static constexpr int64_t kBlockWords = 16;
static constexpr int64_t kBlockK = kBlockWords * kWordBits;                         // features summed before the row scale
static constexpr int64_t kRows = 16;                                                // rows looked up per pass over the signs
static constexpr int64_t kLine = 64;                                                // bytes fetched at a time
static constexpr int64_t kLinesPerWord = (kBlockN * 4 + kLine - 1) / kLine;         // of signs, for each word of a block

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

  int64_t outputs(int64_t n, int64_t n1) const { return std::min(kBlockN, n1 - n); }
  // Whether a plane adds nothing to outputs [n, n + count): so a bank stores a plane that a tenant lacks.
  bool absent(int64_t plane, int64_t n, int64_t count) const {
    const float* scale = row_scale + plane * N + n;
    float any = 0.0f;
#pragma omp simd reduction(max : any)
    for (int64_t i = 0; i < count; ++i) any = std::max(any, std::abs(scale[i]));
    return any == 0.0f;
  }
};

// Features and planes tabulated together: words [word, word + width) of planes [plane, end).
struct Chunk {
  int64_t word, width, plane, end;
};

// Preparation of x.

// x[k] * col_scale[k] as fp32 for k in [k0, k0 + count), zeros up to the next whole word. Reads nothing past k0 + count.
template <typename T>
static inline void widen(const T* x, int64_t stride, const float* col_scale, int64_t k0, int64_t count, float* out) {
  const T* from = x + k0 * stride;
  if (stride == 1) {
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) out[k] = static_cast<float>(from[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) out[k] = static_cast<float>(from[k * stride]);
  }
  if (col_scale != nullptr) {
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) out[k] *= col_scale[k0 + k];
  }
  for (int64_t k = count; k < words(count) * kWordBits; ++k) out[k] = 0.0f;
}

// The signed sums of every group of one word of features: table[group][entry], entry bit i set means +x[group start + i].
static BITDELTA_INLINE void tabulate(const float* x, float* table) {
  using Float = Lanes::Float;
  constexpr int64_t L = Lanes::lanes;
  alignas(64) float sign[Lanes::bits][kEntries];
  for (int64_t i = 0; i < Lanes::bits; ++i)
    for (int64_t entry = 0; entry < kEntries; ++entry) sign[i][entry] = (entry >> i & 1) != 0 ? 1.0f : -1.0f;
  for (int64_t group = 0; group < kGroups; ++group)
    for (int64_t entry = 0; entry < kEntries; entry += L) {
      Float sum = Lanes::zero();
      for (int64_t i = 0; i < Lanes::bits; ++i) {
        const int64_t k = group * Lanes::bits + i;
        if (k < kWordBits) sum = Lanes::fma(Lanes::load(sign[i] + entry), Lanes::broadcast(x[k]), sum);
      }
      Lanes::store(table + group * kEntries + entry, sum);
    }
}

// Signs fetched into L2 ahead of their use, in the order of use and a few lines at a time while others are looked up: all at
// once they overrun the miss buffers and the processor drops them. Addresses, not pointers: they may lie past the end.
class Ahead {
 public:
  // The present planes of `chunk` for outputs [n0, n1), kBlockN outputs at a time.
  Ahead(const Delta& d, int64_t n0, int64_t n1) : d_(d), n0_(n0), n1_(n1) {}

  void start(const Chunk& chunk) {
    chunk_ = chunk, n_ = n0_ - kBlockN, plane_ = chunk.end, rows_ = 0, at_ = end_ = 0;
  }
  // Lines of the first block: the distance between what is fetched and what is used.
  int64_t distance() const { return (chunk_.end - chunk_.plane) * kBlockN * ((chunk_.width * 4 + kLine - 1) / kLine); }

  BITDELTA_INLINE void fetch(int64_t lines) {
    for (int64_t i = 0; i < lines; ++i) {
      if (at_ >= end_ && !next()) return;
      BITDELTA_PREFETCH(at_);
      at_ += kLine;
    }
  }

 private:
  bool next() {
    const int64_t W = words(d_.K), bytes = std::min(chunk_.width, W - chunk_.word) * 4;
    if (rows_ == 0) {
      do {
        if (++plane_ >= chunk_.end) plane_ = chunk_.plane, n_ += kBlockN;
        if (n_ >= n1_) {
          n_ = n1_, plane_ = chunk_.end;
          return false;
        }
      } while (d_.absent(plane_, n_, d_.outputs(n_, n1_)));
      rows_ = d_.outputs(n_, n1_);
      row_ = reinterpret_cast<uintptr_t>(d_.signs) + static_cast<uintptr_t>(((plane_ * d_.N + n_) * W + chunk_.word) * 4);
    }
    const int64_t some = bytes == W * 4 ? rows_ : 1;  // rows without a gap between them
    at_ = row_;
    end_ = row_ + static_cast<uintptr_t>((some - 1) * W * 4 + bytes);
    row_ += static_cast<uintptr_t>(some * W * 4);
    rows_ -= some;
    return true;
  }

  const Delta& d_;
  const int64_t n0_, n1_;
  Chunk chunk_{};
  int64_t n_ = 0, plane_ = 0, rows_ = 0;
  uintptr_t row_ = 0, at_ = 0, end_ = 0;
};

// Lookups.

// Sign words of one block, a lane per output: [kBlockWords][kBlockN].
struct Bits {
  alignas(64) uint32_t at[kBlockWords * kBlockN];
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

// Tables of some rows of x, at one block of features of one plane: row r begins at `at + r * stride`.
struct Tables {
  const float* at;
  int64_t stride;
};

// y[r][n] += row_scale[n] * (sum over the block) for R rows and kBlockN outputs.
template <int64_t R>
static inline void look_up(const Bits& bits, int64_t count, Tables tables, const float* row_scale, Ahead* ahead, float* y, int64_t ldy) {
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
    for (int64_t group = 0; group < kGroups; ++group) {
      for (int64_t r = 0; r < R; ++r) {
        const float* entries = tables.at + r * tables.stride + word * kWordTable + group * kEntries;
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
static inline void look_up_whole(const Bits& bits, int64_t count, Tables tables, int64_t rows, const float* row_scale, Ahead& ahead, float* y, int64_t ldy) {
  int64_t r = 0;
  const auto step = [&](auto width) {
    for (constexpr int64_t R = decltype(width)::value; r + R <= rows; r += R)
      look_up<R>(bits, count, Tables{tables.at + r * tables.stride, tables.stride}, row_scale, r == 0 ? &ahead : nullptr, y + r * ldy, ldy);
  };
  if constexpr (Lanes::rows >= 4) step(std::integral_constant<int64_t, 4>{});
  if constexpr (Lanes::rows >= 2) step(std::integral_constant<int64_t, 2>{});
  step(std::integral_constant<int64_t, 1>{});
}

// The same for any outputs [n, n + outputs) of one block. Where the block is not whole, in a padded copy: the same instructions, hence
// the same results.
static inline void look_up_rows(const Bits& bits, int64_t count, Tables tables, int64_t rows, const float* row_scale, int64_t outputs, Ahead& ahead, float* y,
                                int64_t ldy) {
  if (outputs == kBlockN) {
    look_up_whole(bits, count, tables, rows, row_scale, ahead, y, ldy);
    return;
  }
  float scale[kBlockN] = {};
  float copy[kRows * kBlockN] = {};
  std::copy(row_scale, row_scale + outputs, scale);
  for (int64_t r = 0; r < rows; ++r) std::copy(y + r * ldy, y + r * ldy + outputs, copy + r * kBlockN);
  look_up_whole(bits, count, tables, rows, scale, ahead, copy, kBlockN);
  for (int64_t r = 0; r < rows; ++r) std::copy(copy + r * kBlockN, copy + r * kBlockN + outputs, y + r * ldy);
}

// Tiles.

// Tabulates `rows` rows of x for a chunk, the first signs being fetched meanwhile.  table: as in add_chunk.
template <typename T, typename RowOf>
static inline void tabulate_chunk(const Delta& d, const Chunk& chunk, const float* col_scale, const T* x, int64_t stride, const RowOf& row_of, int64_t rows,
                                  Ahead& ahead, float* table) {
  const int64_t first = chunk.word * kWordBits, stop = std::min(d.K, (chunk.word + chunk.width) * kWordBits);
  const int64_t end = col_scale != nullptr ? chunk.end : chunk.plane + 1, all = words(stop - first) * rows * (end - chunk.plane);
  const int64_t lines = (ahead.distance() + all - 1) / all;
  float wide[kBlockK];
  for (int64_t plane = chunk.plane; plane < end; ++plane) {
    for (int64_t i = 0; i < rows; ++i) {
      float* to = table + ((plane - chunk.plane) * rows + i) * chunk.width * kWordTable;
      for (int64_t k = first; k < stop; k += kBlockK) {
        const int64_t count = std::min(kBlockK, stop - k);
        widen(x + row_of(i), stride, col_scale != nullptr ? col_scale + plane * d.K : nullptr, k, count, wide);
        for (int64_t w = 0; w < words(count); ++w, to += kWordTable) {
          ahead.fetch(lines);
          tabulate(wide + w * kWordBits, to);
        }
      }
    }
  }
}

// Adds a chunk to y[i, n - n0] for n in [n0, n1).  table: fp32 [planes, rows, width, kWordTable]; without `per_plane` all planes
// share the first.
static inline void add_chunk(const Delta& d, const Chunk& chunk, const float* table, bool per_plane, int64_t rows, int64_t n0, int64_t n1, Ahead& ahead,
                             float* y, int64_t ldy) {
  const int64_t W = words(d.K), stride = chunk.width * kWordTable, stop = std::min(W, chunk.word + chunk.width);
  Bits bits;
  for (int64_t n = n0; n < n1; n += kBlockN) {
    const int64_t outputs = d.outputs(n, n1);
    for (int64_t word = chunk.word; word < stop; word += kBlockWords) {
      const int64_t count = std::min(kBlockWords, stop - word);
      for (int64_t plane = chunk.plane; plane < chunk.end; ++plane) {
        if (d.absent(plane, n, outputs)) continue;
        const float* const first = table + (per_plane ? (plane - chunk.plane) * rows * stride : 0) + (word - chunk.word) * kWordTable;
        load_bits(d.signs + (plane * d.N + n) * W + word, W, count, outputs, bits);
        look_up_rows(bits, count, Tables{first, stride}, rows, d.row_scale + plane * d.N + n, outputs, ahead, y + n - n0, ldy);
      }
    }
  }
}

// y[i, n - n0] for n in [n0, n1) and `rows` rows of x of one tenant, overwritten.
//   x: T, element k of row m at x[m * row_stride + k * stride].  index: the rows' numbers m, or null for 0, 1, ... rows - 1.
//   col_scale: fp32 [P, K], or null.  Takes 140 KB of stack.
template <typename T, typename Index = int64_t>
static inline void delta_tile(const Delta& d, const float* col_scale, const T* x, int64_t row_stride, int64_t stride, const Index* index, int64_t rows,
                             int64_t n0, int64_t n1, float* y, int64_t ldy) {
  alignas(64) float table[kRows * kBlockWords * kWordTable];
  const int64_t W = words(d.K);
  Ahead ahead(d, n0, n1);
  for (int64_t r = 0; r < rows; ++r) std::fill(y + r * ldy, y + r * ldy + (n1 - n0), 0.0f);
  for (int64_t first = 0; first < rows; first += kRows) {
    const auto row_of = [&](int64_t i) { return (index != nullptr ? static_cast<int64_t>(index[first + i]) : first + i) * row_stride; };
    const int64_t some = std::min(kRows, rows - first);
    // As many features and planes at a time as there is room to tabulate: the more, the longer the runs in which signs are read.
    const int64_t fit = kRows / (some * (col_scale != nullptr ? std::max<int64_t>(1, d.planes) : 1));
    const int64_t width = std::max<int64_t>(1, fit) * kBlockWords, planes = fit > 0 ? d.planes : 1;
    for (int64_t word = 0; word < W; word += width) {
      for (int64_t plane = 0; plane < d.planes; plane += planes) {
        const Chunk chunk{word, width, plane, plane + planes};
        ahead.start(chunk);
        tabulate_chunk(d, chunk, col_scale, x, stride, row_of, some, ahead, table);
        add_chunk(d, chunk, table, col_scale != nullptr, some, n0, n1, ahead, y + first * ldy, ldy);
      }
    }
  }
}

}  // namespace BITDELTA_ISA
}  // namespace bitdelta
