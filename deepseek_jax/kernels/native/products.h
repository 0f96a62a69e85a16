// Products on a CPU whose rows are all of one matrix, which is read where it lies, of float32 or bfloat16.

#pragma once

#include "tiles.h"

namespace native {

constexpr int64_t kFits = 1 << 19;      // bytes of a matrix that are fetched at once
constexpr int64_t kDepth = 512;         // of the inner dimension, packed at once
constexpr int64_t kBlock = 16 * kRows;  // rows of a unit of work

// Brings a matrix into a core's cache in the order of memory, if it fits: a panel takes but some numbers of each line.
template <typename T>
void Fetch(const Matrix<T>& b, int64_t rows, int64_t columns) {
  if (rows * columns * sizeof(T) > kFits) return;
  if (b.column != 1) std::swap(rows, columns);
  const int64_t stride = std::max(b.row, b.column);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += 64 / sizeof(T)) *(const volatile char*)(b.data + i * stride + j);
}

// C [rows, width] (+)= A [rows, depth] B, where B is packed, of at most a panel's width; at most kBlock rows.
inline void Strip(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* panel, float* c,
                  int64_t c_row, int64_t width, bool add) {
  if (width == kPanel) {
    Times(rows, depth, a, a_row, a_depth, panel, c, c_row, add);
    return;
  }
  float edge[kBlock * kPanel];
  for (int64_t i = 0; add && i < rows; ++i) std::memcpy(edge + i * kPanel, c + i * c_row, width * sizeof(float));
  Times(rows, depth, a, a_row, a_depth, panel, edge, kPanel, add);
  for (int64_t i = 0; i < rows; ++i) std::memcpy(c + i * c_row, edge + i * kPanel, width * sizeof(float));
}

// C [rows, width] = A [rows, depth] B, where all of B is packed; at most kBlock rows.
inline void TimesAll(int64_t rows, int64_t depth, const float* a, int64_t a_row, const float* panels, int64_t width, float* c,
                     int64_t c_row) {
  for (int64_t k = 0; k < depth; k += kDepth)
    for (int64_t j = 0; j < width; j += kPanel)
      Strip(rows, std::min(kDepth, depth - k), a + k, a_row, 1, panels + j * depth + k * kPanel, c + j, c_row,
            std::min<int64_t>(kPanel, width - j), k > 0);
}

// C [rows, columns] = A [rows, depth] B [depth, columns], with at most kBlock rows; rows of C are contiguous. T: float or
// Bfloat16.
template <typename T>
void Multiply(const Matrix<float>& a, const Matrix<T>& b, float* c, int64_t c_row, int64_t rows, int64_t columns,
              int64_t depth);

}  // namespace native
