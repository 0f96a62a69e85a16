// Products on a CPU of operands that are prepared for it, or of a matrix that is read where it lies, of float32 or bfloat16.
//
// The right operand is packed in panels, kPanel columns each, so that a pass over the inner dimension reads memory in order.
// The left one is read where it lies, unless the processor has matrix units.

#pragma once

#include "tiles.h"
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define MATRIX_UNITS
#include "matrix_units.h"
#endif

namespace native {

constexpr int64_t kFits = 1 << 19;      // bytes of a matrix that are fetched at once
constexpr int64_t kDepth = 512;         // of the inner dimension, packed at once
constexpr int64_t kBlock = 16 * kRows;  // rows of a unit of work
#ifdef MATRIX_UNITS
constexpr int64_t kTall = 2 * kSide;  // rows of a tile
#else
constexpr int64_t kTall = kRows, kDeep = 1;
#endif
static_assert(kBlock % kTall == 0 && kDepth % kDeep == 0);

// Any number as whole steps.
inline int64_t Whole(int64_t number, int64_t step = kPanel) { return (number + step - 1) / step * step; }

// Numbers of room that a packed panel takes. What is packed of a depth from k on, a multiple of kDeep, lies that of k behind
// its beginning.
inline int64_t PanelRoom(int64_t depth) {
#ifdef MATRIX_UNITS
  return Whole(depth, kDeep) / kDeep * 2 * kThirds;
#else
  return depth * kPanel;
#endif
}

// And that all panels of a matrix take.
inline int64_t PanelsRoom(int64_t depth, int64_t columns) { return PanelRoom(depth) * (Whole(columns) / kPanel); }

// Some of the inner dimension, all columns: panels that lie so many numbers apart.
template <typename T>
void PackPanels(const Matrix<T>& b, int64_t depth, int64_t columns, float* panels, int64_t apart) {
  for (int64_t j = 0; j < columns; j += kPanel, panels += apart) {
    const int64_t width = std::min<int64_t>(kPanel, columns - j);
#ifdef MATRIX_UNITS
    for (int64_t k = 0; k < depth; k += kDeep)
      for (int64_t part = 0; part < 2; ++part) {
        const int64_t some = width - part * kSide, deep = std::min(kDeep, depth - k);
        uint32_t* to = (uint32_t*)panels + k / kDeep * 2 * kThirds + part * kThirds;
        if (some > 0) Split<false, kParts<T>>(b.at(k, j + part * kSide), b.column, b.row, std::min(some, kSide), deep, to);
      }
#else
    Pack(Matrix<T>{b.at(0, j), b.row, b.column}, depth, width, panels);
#endif
  }
}

// A whole matrix of the right, whose panels lie behind each other.
template <typename T>
void PackWhole(const Matrix<T>& b, int64_t depth, int64_t columns, float* panels) {
  PackPanels(b, depth, columns, panels, PanelRoom(depth));
}

// Rows of the left, at most kBlock, as products take them.
struct Rows {
  int64_t rows, depth;
#ifdef MATRIX_UNITS
  const uint32_t* tiles;
  bool halves;
#else
  Matrix<float> a;
#endif
};

// A thread has one of these at a time: it may lie in room that is the thread's. halves: all numbers are those of bfloat16.
Rows Ready(const Matrix<float>& a, int64_t rows, int64_t depth, bool halves = false);

// C [rows, columns] (+)= A times packed panels of A's depth, which lie so many numbers apart; rows of C are contiguous. T: what
// they were packed from, float or Bfloat16.
template <typename T = float>
void Product(const Rows& a, const float* panels, int64_t apart, int64_t columns, float* c, int64_t c_row, bool add);

// C [rows, columns] = A [rows, depth] B, where all of B is packed behind each other.
template <typename T = float>
void ProductOfWhole(const Matrix<float>& a, const float* panels, float* c, int64_t c_row, int64_t rows, int64_t columns,
                    int64_t depth, bool halves = false) {
  Product<T>(Ready(a, rows, depth, halves), panels, PanelRoom(depth), columns, c, c_row, false);
}

// Brings a matrix into a core's cache in the order of memory, if it fits: a panel takes but some numbers of each line.
template <typename T>
void Fetch(const Matrix<T>& b, int64_t rows, int64_t columns) {
  if (rows * columns * sizeof(T) > kFits) return;
  if (b.column != 1) std::swap(rows, columns);
  const int64_t stride = std::max(b.row, b.column);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += 64 / sizeof(T)) *(const volatile char*)(b.data + i * stride + j);
}

// C [rows, columns] = A [rows, depth] B [depth, columns], where nothing is prepared; at most kBlock rows, and rows of C are
// contiguous. T: float or Bfloat16.
template <typename T>
void Multiply(const Matrix<float>& a, const Matrix<T>& b, float* c, int64_t c_row, int64_t rows, int64_t columns,
              int64_t depth);

}  // namespace native
