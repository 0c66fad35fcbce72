// A packed delta as the CPU kernels read it: its sizes, its signs fetched ahead of their use, its bits with a lane per output.
#pragma once

#include "cpu_lanes.h"

namespace bitdelta {
inline namespace BITDELTA_ISA {

static constexpr int64_t kWordBits = 32;
static constexpr int64_t kBlockN = Lanes::lanes * Lanes::blocks;             // outputs of one inner step
static constexpr int64_t kBlockWords = 16;                                   // words of one inner step, at most
static constexpr int64_t kLine = 64;                                         // bytes fetched at a time
static constexpr int64_t kLinesPerWord = (kBlockN * 4 + kLine - 1) / kLine;  // of signs, for each word of a block

static inline int64_t words(int64_t features) { return (features + kWordBits - 1) / kWordBits; }

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

// The signs of one block as `Sums` arranges them; a lane per output: words [kBlockWords][kBlockN].
struct Bits {
  alignas(64) uint32_t at[kBlockWords * kBlockN];
};

// Four words of kBlockN rows, `stride` words apart, a lane per output.
static BITDELTA_INLINE void transpose_block(const int32_t* p, int64_t stride, int64_t word, Bits& bits) {
  for (int64_t row = 0; row < kBlockN; row += Lanes::lanes) Lanes::transpose(p + row * stride, stride, bits.at + word * kBlockN + row, kBlockN);
}

// Arranges `count` words of `outputs` rows of signs for `Sums`; absent outputs get zeros.
template <typename Sums>
static inline void load_bits(const int32_t* signs, int64_t W, int64_t count, int64_t outputs, Bits& bits) {
  for (int64_t word = 0; word < count; word += 4) {
    if (outputs == kBlockN && word + 4 <= count) {
      Sums::arrange(signs + word, W, word, bits);
    } else {
      int32_t copy[kBlockN * 4] = {};
      for (int64_t row = 0; row < outputs; ++row)
        for (int64_t w = 0; w < std::min<int64_t>(4, count - word); ++w) copy[row * 4 + w] = signs[row * W + word + w];
      Sums::arrange(copy, 4, word, bits);
    }
  }
}

}  // namespace BITDELTA_ISA
}  // namespace bitdelta
