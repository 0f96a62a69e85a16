// What compiled code for a CPU is made of: vectors of float32, the exponential function, tiles of a product in registers and
// packed matrices.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace native {

#ifdef __AVX512F__
constexpr int kLanes = 16, kRows = 12;
#else
constexpr int kLanes = 8, kRows = 6;
#endif
constexpr int kPanel = 2 * kLanes;  // columns of a packed panel

typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef int32_t Signs __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

// A bfloat16 is a float32 without its lower half.
struct Bfloat16 {
  uint16_t bits;
};

inline Vector Loaded(const float* from) { return *(const Vector*)from; }
inline Vector Loaded(const Bfloat16* from) {
  const Halves halves = *(const Halves*)from;
  // Of the conversion that all compilers know GCC makes two halves and five operations.
#if defined(__AVX512F__)
  return (Vector)((Words)_mm512_cvtepu16_epi32((__m256i)halves) << 16);
#elif defined(__AVX2__)
  return (Vector)((Words)_mm256_cvtepu16_epi32((__m128i)halves) << 16);
#else
  return (Vector)(__builtin_convertvector(halves, Words) << 16);
#endif
}
inline float Value(float x) { return x; }
inline float Value(Bfloat16 x) {
  const uint32_t word = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// A vector of which only the first numbers are in memory, or whole; the others are zeros, and are not stored.
inline Vector Some(const float* from, int64_t numbers) {
  if (numbers >= kLanes) return Loaded(from);
  Vector some = {};
  std::memcpy(&some, from, numbers * sizeof(float));
  return some;
}
inline void Store(Vector x, float* to, int64_t numbers) {
  if (numbers >= kLanes)
    *(Vector*)to = x;
  else
    std::memcpy(to, &x, numbers * sizeof(float));
}

// e^x for x <= 0; 0 below e^-87. A Taylor polynomial on half a unit of log 2 either way.
inline Vector Exp(Vector x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: added, it leaves an integer in the lowest bits
  const auto small = x < -87.0f;
  x = small ? Vector{} : x;
  const Vector shifted = x * 1.442695041f + kRound;
  const Vector whole = shifted - kRound;
  // log 2 in two parts, of which the first times an integer is exact.
  const Vector r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vector y = r * (1.0f / 5040) + 1.0f / 720;
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * r + c;
  const Words power = (((Words)shifted - 0x4B400000u) + 127u) << 23;
  return small ? Vector{} : y * (Vector)power;
}

// A product in registers, C [R, kPanel] (+)= A [R, depth] B: depth, a, how far its rows and columns are apart, b, how far its
// rows are, c, how far its rows are, whether to add.
using TileOf = void (*)(int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool);
TileOf PanelTile(int64_t rows);  // of at most kRows

// C [rows, kPanel] (+)= A [rows, depth] B, where B is packed.
inline void Times(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* panel,
                  float* c, int64_t c_row, bool add) {
  for (int64_t i = 0; i < rows; i += kRows) {
    const TileOf tile = PanelTile(std::min<int64_t>(kRows, rows - i));
    tile(depth, a + i * a_row, a_row, a_depth, panel, kPanel, c + i * c_row, c_row, add);
  }
}

// A matrix of the product: element (i, j) at data[i * row + j * column].
template <typename T>
struct Matrix {
  const T* data;
  int64_t row, column;
  const T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

// Turns a square of numbers, whose rows are vectors: swaps its blocks of S by S numbers, then those of half that size.
template <int S, int... I>
inline void Turn(Vector (&square)[kLanes], std::integer_sequence<int, I...> lanes) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const Vector a = square[i], b = square[i + S];
    square[i] = __builtin_shufflevector(a, b, (I & S ? kLanes + I - S : I)...);
    square[i + S] = __builtin_shufflevector(a, b, (I & S ? kLanes + I : I + S)...);
  }
  if constexpr (S > 1) Turn<S / 2>(square, lanes);
}

// A panel's width of a matrix in float32, zeros where it has fewer columns.
template <typename T>
void Pack(const Matrix<T>& b, int64_t depth, int64_t width, float* panel) {
  if (width < kPanel) std::memset(panel, 0, depth * kPanel * sizeof(float));
  if (b.column == 1) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < width; ++j) panel[k * kPanel + j] = Value(b.data[k * b.row + j]);
    return;
  }
  const int64_t squares_j = b.row == 1 ? width / kLanes * kLanes : 0, squares_k = depth / kLanes * kLanes;
  for (int64_t k = 0; k < squares_k; k += kLanes)
    for (int64_t j = 0; j < squares_j; j += kLanes) {
      Vector square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = Loaded(b.at(k, j + i));
      Turn<kLanes / 2>(square, std::make_integer_sequence<int, kLanes>());
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) *(Vector*)(panel + (k + i) * kPanel + j) = square[i];
    }
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t j = k < squares_k ? squares_j : 0; j < width; ++j) panel[k * kPanel + j] = Value(*b.at(k, j));
}

// All columns of a matrix, panel after panel.
template <typename T>
void PackAll(const Matrix<T>& b, int64_t depth, int64_t width, float* panels) {
  for (int64_t j = 0; j < width; j += kPanel)
    Pack(Matrix<T>{b.at(0, j), b.row, b.column}, depth, std::min<int64_t>(kPanel, width - j), panels + j * depth);
}

// Room for so many numbers in what a thread keeps for it, from the beginning of a line of memory on: a vector in two lines
// takes twice as long.
inline float* Room(std::vector<float>& space, int64_t numbers) {
  if (int64_t(space.size()) < numbers + 16) space.resize(numbers + 16);
  return (float*)((uintptr_t(space.data()) + 63) / 64 * 64);
}

}  // namespace native
