// The base linear for few rows on a CPU: `base_tile`, y[m, n] = sum_k x[m, k] * w[n, k], accumulated in fp32.
//
// For few rows the time is that of reading w. It is read once, in the order of its addresses, whatever the number of rows.
//
// Order of arithmetic. y[m, n] is one chain over steps of features in each lane, then the sum of the lanes: it depends on
// row m of x and row n of w only, so any split over rows or outputs gives the same bits.
#pragma once

#include "cpu_lanes.h"

#include <memory>

namespace bitdelta {
inline namespace BITDELTA_ISA {

// Partial sums of one dot product, `step` features at a time; T is the type of both operands.
template <typename T>
struct Dot {
  using Element = T;
#if defined(BITDELTA_PORTABLE)
  static constexpr int64_t step = 1;
  float sum = 0.0f;
  using Vector = float;
  static BITDELTA_INLINE Vector load(const T* p) { return static_cast<float>(*p); }
  BITDELTA_INLINE void add(Vector a, Vector b) { sum += a * b; }
  BITDELTA_INLINE float total() const { return sum; }
#else
  static constexpr int64_t step = Lanes::lanes;
  using Vector = Lanes::Float;
  Vector sum = Lanes::zero();
  static BITDELTA_INLINE Vector load(const T* p) {
    if constexpr (std::is_same_v<T, float>) {
      return Lanes::load(p);
    } else {
      alignas(64) float wide[step];
      for (int64_t i = 0; i < step; ++i) wide[i] = static_cast<float>(p[i]);
      return Lanes::load(wide);
    }
  }
  BITDELTA_INLINE void add(Vector a, Vector b) { sum = Lanes::fma(a, b, sum); }
  BITDELTA_INLINE float total() const { return Lanes::total(sum); }
#endif
};

// The same for bf16, with its own instruction where there is one.
#if defined(BITDELTA_AVX512) && defined(__AVX512BF16__)
template <typename T>
struct BFloat16Dot {
  using Element = T;
  static constexpr int64_t step = 32;
  using Vector = __m512bh;
  __m512 sum = _mm512_setzero_ps();
  static BITDELTA_INLINE Vector load(const T* p) {
    static_assert(sizeof(T) == 2);
    const __m512i bits = _mm512_loadu_si512(p);
    Vector v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  BITDELTA_INLINE void add(Vector a, Vector b) { sum = _mm512_dpbf16_ps(sum, a, b); }
  BITDELTA_INLINE float total() const { return Lanes::total(sum); }
};
#else
template <typename T>
using BFloat16Dot = Dot<T>;
#endif

static constexpr int64_t kBaseRows = 4;            // at most 4: rows of x side by side
static constexpr int64_t kBaseOutputs = 4;         // rows of w side by side
static constexpr int64_t kBaseAhead = 16 * 1024;   // bytes from the weights in use to those fetched, at least

// Outputs per tile: a share for every thread, but no more than leaves room for the results of some rows in L2.
static inline int64_t base_tile_outputs(int64_t N, int64_t threads) {
  const int64_t share = (N + threads - 1) / threads;
  return std::min<int64_t>(512, (share + kBaseOutputs - 1) / kBaseOutputs * kBaseOutputs);
}

// Rows of x laid out as they are read: kBaseRows rows (the last time fewer) side by side, a step of features at a time, zeros at the end.
template <typename D>
class PackedRows {
  using T = typename D::Element;

 public:
  const int64_t count, K;

  PackedRows(const T* x, int64_t rows, int64_t features)
      : count(rows), K(features), padded_((K + D::step - 1) / D::step * D::step), data_(new T[count * padded_]) {
    for (int64_t first = 0; first < count; first += kBaseRows) {
      T* to = data_.get() + first * padded_;
      for (int64_t k = 0; k < padded_; k += D::step)
        for (int64_t m = first; m < std::min(count, first + kBaseRows); ++m) {
          const int64_t some = std::min(D::step, K - k);
          std::fill(std::copy(x + m * K + k, x + m * K + k + some, to), to + D::step, T(0.0f));
          to += D::step;
        }
    }
  }
  const T* group(int64_t first) const { return data_.get() + first * padded_; }

 private:
  int64_t padded_;
  std::unique_ptr<T[]> data_;
};

// y[r, c] of R packed rows and C rows of w. As many weights are fetched, for later, from `fetch` on, if it is not 0: an address,
// not a pointer, for it may lie past the end.
template <typename D, int64_t R, int64_t C>
static inline void dot_block(const typename D::Element* x, const typename D::Element* w, int64_t K, uintptr_t fetch, float* y, int64_t ldy) {
  using T = typename D::Element;
  constexpr int64_t bytes = C * D::step * static_cast<int64_t>(sizeof(T));
  D sums[R][C];
  const auto add = [&](const T* weights, int64_t stride) {
    typename D::Vector rows[R];
    for (int64_t r = 0; r < R; ++r) rows[r] = D::load(x + r * D::step);
    for (int64_t c = 0; c < C; ++c) {
      const typename D::Vector row = D::load(weights + c * stride);
      for (int64_t r = 0; r < R; ++r) sums[r][c].add(rows[r], row);
    }
    x += R * D::step;
  };
  int64_t k = 0;
  for (; k + D::step <= K; k += D::step) {
    if (fetch != 0) {
      for (int64_t byte = 0; byte < bytes; byte += 64) BITDELTA_PREFETCH(fetch + static_cast<uintptr_t>(byte));
      fetch += bytes;
    }
    add(w + k, K);
  }
  if (k < K) {
    T rest[C * D::step] = {};
    for (int64_t c = 0; c < C; ++c) std::copy(w + c * K + k, w + (c + 1) * K, rest + c * D::step);
    add(rest, D::step);
  }
  for (int64_t r = 0; r < R; ++r)
    for (int64_t c = 0; c < C; ++c) y[r * ldy + c] = sums[r][c].total();
}

// All rows for C rows of w.
template <typename D, int64_t C>
static inline void dot_rows(const PackedRows<D>& x, const typename D::Element* w, uintptr_t fetch, float* y, int64_t ldy) {
  int64_t m = 0;
  for (; m + kBaseRows <= x.count; m += kBaseRows, fetch = 0) dot_block<D, kBaseRows, C>(x.group(m), w, x.K, fetch, y + m * ldy, ldy);
  const int64_t rest = x.count - m;
  if (rest == 3) dot_block<D, 3, C>(x.group(m), w, x.K, fetch, y + m * ldy, ldy);
  if (rest == 2) dot_block<D, 2, C>(x.group(m), w, x.K, fetch, y + m * ldy, ldy);
  if (rest == 1) dot_block<D, 1, C>(x.group(m), w, x.K, fetch, y + m * ldy, ldy);
}

// y[m, n - n0] for n in [n0, n1).  w: T [N, K].
template <typename D>
static inline void base_tile(const PackedRows<D>& x, const typename D::Element* w, int64_t N, int64_t n0, int64_t n1, float* y, int64_t ldy) {
  const int64_t bytes = x.K * static_cast<int64_t>(sizeof(typename D::Element)), block = std::max<int64_t>(1, kBaseOutputs * bytes);
  const int64_t ahead = (kBaseAhead + block - 1) / block * kBaseOutputs;
  int64_t n = n0;
  for (; n + kBaseOutputs <= n1; n += kBaseOutputs) {
    const uintptr_t fetch = n + ahead < N ? reinterpret_cast<uintptr_t>(w) + static_cast<uintptr_t>((n + ahead) * bytes) : 0;
    dot_rows<D, kBaseOutputs>(x, w + n * x.K, fetch, y + n - n0, ldy);
  }
  for (; n < n1; ++n) dot_rows<D, 1>(x, w + n * x.K, 0, y + n - n0, ldy);
}

}  // namespace BITDELTA_ISA
}  // namespace bitdelta
