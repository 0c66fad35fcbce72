// The low-rank part of a delta on a CPU: y[m, n] += sum_r left[n, r] * (sum_k right[r, k] * x[m, k]), in fp32.
// Fixed order of sums: a row's result depends on nothing but that row.
#pragma once

#include <algorithm>
#include <cstdint>

namespace bitdelta {

// inner[r] = sum_k right[r, k] * x[k].  x: T [K].  right: U [rank, K].
template <typename T, typename U>
static inline void project(const T* x, const U* right, int64_t rank, int64_t K, float* inner) {
  constexpr int64_t lanes = 16;
  for (int64_t r = 0; r < rank; ++r) {
    float sums[lanes] = {};
    int64_t k = 0;
    for (; k + lanes <= K; k += lanes)
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) sums[i] += static_cast<float>(x[k + i]) * static_cast<float>(right[r * K + k + i]);
    float total = 0.0f;
    for (; k < K; ++k) total += static_cast<float>(x[k]) * static_cast<float>(right[r * K + k]);
    for (int64_t i = 0; i < lanes; ++i) total += sums[i];
    inner[r] = total;
  }
}

// y[i, n - n0] += sum_r left[n, r] * inner[i, r] for n in [n0, n1).  left: U [N, rank].  y: rows `ldy` floats apart.
// Rows whose `inner` is zero are left as they are: a tenant without a low-rank part is stored as zeros.
template <typename U>
static inline void expand(const float* inner, const U* left, int64_t rank, int64_t rows, int64_t n0, int64_t n1, float* y, int64_t ldy) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* const values = inner + i * rank;
    if (std::all_of(values, values + rank, [](float value) { return value == 0.0f; })) continue;
    for (int64_t n = n0; n < n1; ++n) {
      float total = 0.0f;
      for (int64_t r = 0; r < rank; ++r) total += static_cast<float>(left[n * rank + r]) * values[r];
      y[i * ldy + n - n0] += total;
    }
  }
}

}  // namespace bitdelta
