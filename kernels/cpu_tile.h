// The device function of the CPU delta op: `delta_tile`, an output tile of
//
//     y[m, n] = sum_p row_scale[p, n] * sum_k sign[p, n, k] * col_scale[p, k] * x[m, k]
//
// from canonical sign words (kernels/layout.py: int32 [P, N, W], bit j of word w is feature 32 w + j, 1 is +1, 0 is -1).
//
// Method. The signed sums of a few features are tabulated once per row of x and looked up by the sign bits (`Sums`: ExactSums of
// cpu_sums.h or RoundedSums of cpu_rounded.h). Bits of 4 words are transposed so that a lane is an output; any number of rows
// then looks up the same bits. No unpacked weights, no multiplications by +-1.
//
// Order of arithmetic. y[m, n] is a chain over blocks of `block_words` words, then planes, of fma(row_scale, sum over the
// block). It depends on nothing else: any split over n or rows, any company of other rows give the same bits. A plane whose
// scales are all zero in a block of kBlockN outputs is absent there: it adds nothing and its signs are not read.
//
// Use: for every block of kRows rows of one tenant, for every range [n0, n1) of tile_outputs(...),
//     delta_tile<Sums>(Delta{signs, row_scale, planes, N, K}, col_scale_or_null, x, K, 1, index_or_null, rows, n0, n1, y, ldy)
#pragma once

#include "cpu_rounded.h"

namespace bitdelta {
inline namespace BITDELTA_ISA {

static constexpr int64_t kRows = 16;  // rows looked up per pass over the signs

// Outputs per tile: wide enough that tabulating x is lost in the lookups, small enough to stay in the caches and to give
// every thread a tile.
static inline int64_t tile_outputs(int64_t N, int64_t row_tiles, int64_t threads) {
  const int64_t steps = (N + kBlockN - 1) / kBlockN;
  const int64_t shares = std::max<int64_t>(1, (threads + row_tiles - 1) / std::max<int64_t>(row_tiles, 1));
  const int64_t wanted = std::max<int64_t>(1, (steps + shares - 1) / shares) * kBlockN;
  return row_tiles > 1 ? std::min<int64_t>(wanted, 2048) : wanted;
}

// Floats from one row of a tile to the next: rows a power of two apart would share few sets of the L1 cache.
static inline int64_t tile_stride(int64_t outputs) { return (outputs + 15) / 16 * 16 + 16; }

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

// A chunk's tables: fp32 or rounded sums, `blocks` of them for each of `rows` rows; with `per_plane`, for each plane.
template <typename Sums>
struct Tables {
  typename Sums::Block* at;
  int64_t rows, blocks;
  bool per_plane;

  typename Sums::Block* row(int64_t plane, int64_t row) const { return at + ((per_plane ? plane : 0) * rows + row) * blocks; }
};

// y[r][n] += row_scale[n] * (sum over the block) for `rows` rows (at most kRows) and kBlockN outputs, in the widest steps that fit the
// registers.
template <typename Sums>
static inline void look_up_whole(const Bits& bits, int64_t count, const typename Sums::Block* tables, int64_t stride, int64_t rows, const float* row_scale,
                                 Ahead& ahead, float* y, int64_t ldy) {
  int64_t r = 0;
  const auto step = [&](auto width) {
    for (constexpr int64_t R = decltype(width)::value; r + R <= rows; r += R)
      Sums::template look_up<R>(bits, count, tables + r * stride, stride, row_scale, r == 0 ? &ahead : nullptr, y + r * ldy, ldy);
  };
  if constexpr (Sums::rows >= 4) step(std::integral_constant<int64_t, 4>{});
  if constexpr (Sums::rows >= 2) step(std::integral_constant<int64_t, 2>{});
  step(std::integral_constant<int64_t, 1>{});
}

// The same for any outputs [n, n + outputs) of one block. Where the block is not whole, in a padded copy: the same instructions, hence
// the same results.
template <typename Sums>
static inline void look_up_rows(const Bits& bits, int64_t count, const typename Sums::Block* tables, int64_t stride, int64_t rows, const float* row_scale,
                                int64_t outputs, Ahead& ahead, float* y, int64_t ldy) {
  if (outputs == kBlockN) {
    look_up_whole<Sums>(bits, count, tables, stride, rows, row_scale, ahead, y, ldy);
    return;
  }
  float scale[kBlockN] = {};
  float copy[kRows * kBlockN] = {};
  std::copy(row_scale, row_scale + outputs, scale);
  for (int64_t r = 0; r < rows; ++r) std::copy(y + r * ldy, y + r * ldy + outputs, copy + r * kBlockN);
  look_up_whole<Sums>(bits, count, tables, stride, rows, scale, ahead, copy, kBlockN);
  for (int64_t r = 0; r < rows; ++r) std::copy(copy + r * kBlockN, copy + r * kBlockN + outputs, y + r * ldy);
}

// Tabulates the rows of x for a chunk, the first signs being fetched meanwhile.
template <typename Sums, typename T, typename RowOf>
static inline void tabulate_chunk(const Delta& d, const Chunk& chunk, const float* col_scale, const T* x, int64_t stride, const RowOf& row_of, Ahead& ahead,
                                  const Tables<Sums>& tables) {
  constexpr int64_t block = Sums::block_words * kWordBits;
  const int64_t first = chunk.word * kWordBits, stop = std::min(d.K, (chunk.word + chunk.width) * kWordBits);
  const int64_t planes = tables.per_plane ? chunk.end - chunk.plane : 1, all = words(stop - first) * tables.rows * planes;
  const int64_t lines = (ahead.distance() + all - 1) / all;
  alignas(64) float wide[block];
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t row = 0; row < tables.rows; ++row) {
      typename Sums::Block* to = tables.row(plane, row);
      for (int64_t k = first; k < stop; k += block, ++to) {
        const int64_t count = std::min(block, stop - k);
        widen(x + row_of(row), stride, col_scale != nullptr ? col_scale + (chunk.plane + plane) * d.K : nullptr, k, count, wide);
        Sums::begin(wide, words(count), *to);
        for (int64_t word = 0; word < words(count); ++word) {
          ahead.fetch(lines);
          Sums::tabulate(wide + word * kWordBits, word, *to);
        }
      }
    }
  }
}

// Adds a chunk to y[i, n - n0] for n in [n0, n1).
template <typename Sums>
static inline void add_chunk(const Delta& d, const Chunk& chunk, const Tables<Sums>& tables, int64_t n0, int64_t n1, Ahead& ahead, float* y, int64_t ldy) {
  const int64_t W = words(d.K), stop = std::min(W, chunk.word + chunk.width);
  Bits bits;
  for (int64_t n = n0; n < n1; n += kBlockN) {
    const int64_t outputs = d.outputs(n, n1);
    for (int64_t word = chunk.word, block = 0; word < stop; word += Sums::block_words, ++block) {
      const int64_t count = std::min(Sums::block_words, stop - word);
      for (int64_t plane = chunk.plane; plane < chunk.end; ++plane) {
        if (d.absent(plane, n, outputs)) continue;
        load_bits<Sums>(d.signs + (plane * d.N + n) * W + word, W, count, outputs, bits);
        look_up_rows<Sums>(bits, count, tables.row(plane - chunk.plane, 0) + block, tables.blocks, tables.rows, d.row_scale + plane * d.N + n, outputs, ahead,
                           y + n - n0, ldy);
      }
    }
  }
}

// y[i, n - n0] for n in [n0, n1) and `rows` rows of x of one tenant, overwritten.
//   x: T, element k of row m at x[m * row_stride + k * stride].  index: the rows' numbers m, or null for 0, 1, ... rows - 1.
//   col_scale: fp32 [P, K], or null.  Takes 140 KB of stack.
template <typename Sums, typename T, typename Index = int64_t>
static inline void delta_tile(const Delta& d, const float* col_scale, const T* x, int64_t row_stride, int64_t stride, const Index* index, int64_t rows,
                             int64_t n0, int64_t n1, float* y, int64_t ldy) {
  static_assert(Sums::held >= kRows && Sums::block_words <= kBlockWords);
  alignas(64) typename Sums::Block held[Sums::held];
  const int64_t W = words(d.K);
  Ahead ahead(d, n0, n1);
  for (int64_t r = 0; r < rows; ++r) std::fill(y + r * ldy, y + r * ldy + (n1 - n0), 0.0f);
  for (int64_t first = 0; first < rows; first += kRows) {
    const auto row_of = [&](int64_t i) { return (index != nullptr ? static_cast<int64_t>(index[first + i]) : first + i) * row_stride; };
    const int64_t some = std::min(kRows, rows - first);
    // As many features and planes at a time as there is room to tabulate: the more, the longer the runs in which signs are read.
    const int64_t fit = Sums::held / (some * (col_scale != nullptr ? std::max<int64_t>(1, d.planes) : 1));
    const int64_t planes = fit > 0 ? d.planes : 1;
    const Tables<Sums> tables{held, some, std::max<int64_t>(1, fit), col_scale != nullptr};
    const int64_t width = tables.blocks * Sums::block_words;
    for (int64_t word = 0; word < W; word += width) {
      for (int64_t plane = 0; plane < d.planes; plane += planes) {
        const Chunk chunk{word, width, plane, plane + planes};
        ahead.start(chunk);
        tabulate_chunk(d, chunk, col_scale, x, stride, row_of, ahead, tables);
        add_chunk(d, chunk, tables, n0, n1, ahead, y + first * ldy, ldy);
      }
    }
  }
}

}  // namespace BITDELTA_ISA
}  // namespace bitdelta
