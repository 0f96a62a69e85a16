// Products of float32 on the matrix units of Intel's processors (AMX), which multiply bfloat16 and sum in float32.
//
// A float32 is the sum of three bfloat16, each the upper half of what the ones before it left, rounded to the nearest. Of
// the nine products of two such sums the six largest are taken: what the other three come to is at most 2^-24 of the whole,
// as much as rounding it to float32 may change. JAX knows this as the algorithm BF16_BF16_F32_X6. Where the right operand is
// of bfloat16, it is three products of three. An infinity makes NaNs, and so does a number that rounds to one, beyond 3.39e38;
// what is below 2^-109 loses some of its digits.

#pragma once

#include <immintrin.h>

#include <type_traits>

#include "tiles.h"

namespace native {

constexpr int64_t kSide = 16;              // rows of a unit's tile, and words of a row: two numbers each
constexpr int64_t kWords = kSide * kSide;  // of a tile
constexpr int64_t kThirds = 3 * kWords;    // of the three tiles that some numbers are the sum of
constexpr int64_t kDeep = 2 * kSide;       // numbers of the inner dimension in a tile
static_assert(kLanes == kSide && kPanel == 2 * kSide);

// Two vectors as bfloat16, those of `low` in the lower halves of the words, and in their place what rounding left.
inline Words Half(Vector& low, Vector& high) {
  typedef uint16_t Order __attribute__((vector_size(64)));
  constexpr Order order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const Words words =
      (Words)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  low -= (Vector)(words << 16);
  high -= (Vector)(words & 0xFFFF0000u);
  return words;
}

// The first numbers of a vector, zeros behind them.
template <typename T>
inline Vector First(const T* from, int64_t numbers) {
  if (numbers >= kLanes) return Loaded(from);
  Vector some = {};
  for (int64_t i = 0; i < numbers; ++i) some[i] = Value(from[i]);
  return some;
}

// How many bfloat16 a number is the sum of.
template <typename T>
constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;

// A tile of a matrix' lines (rows of the left operand, columns of the right one), at most 16, by 32 numbers of the inner
// dimension, as P of words, each of the numbers k and k + 16. kLeft: a row of the tile is a line, and otherwise a k. One of
// `line` and `deep`, which lines and numbers are apart, is 1.
template <bool kLeft, int P, typename T>
inline void Split(const T* from, int64_t line, int64_t deep, int64_t lines, int64_t depth, uint32_t* to) {
  const auto split = [&](auto lows, auto highs) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kSide; ++i) {
      Vector low = lows(i), high = highs(i);
#pragma GCC unroll 3
      for (int p = 0; p < P; ++p) *(Vector*)(to + p * kWords + i * kSide) = (Vector)Half(low, high);
    }
  };
  const bool by_line = deep == 1;
  const int64_t apart = by_line ? line : deep, other = by_line ? kSide : kSide * deep;
  if (lines == kSide && depth == kDeep)
    split([&](int64_t i) { return Loaded(from + i * apart); }, [&](int64_t i) { return Loaded(from + i * apart + other); });
  else if (by_line)
    split([&](int64_t i) { return i < lines ? First(from + i * line, depth) : Vector{}; },
          [&](int64_t i) { return i < lines ? First(from + i * line + kSide, depth - kSide) : Vector{}; });
  else
    split([&](int64_t i) { return i < depth ? First(from + i * deep, lines) : Vector{}; },
          [&](int64_t i) { return i + kSide < depth ? First(from + (i + kSide) * deep, lines) : Vector{}; });
  if (by_line == kLeft) return;
  for (int p = 0; p < P; ++p) {
    Vector square[kSide];
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) square[i] = Loaded((const float*)to + p * kWords + i * kSide);
    Turn<kLanes / 2>(square, std::make_integer_sequence<int, kLanes>());
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) *(Vector*)(to + p * kWords + i * kSide) = square[i];
  }
}

// A thread says how large its tiles are before it uses them, and gives them back.
struct UnitTiles {
  UnitTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~UnitTiles() { _tile_release(); }
};

// C [16 R, 16 V] (+)= A B of so many tiles of the inner dimension, as `Split` leaves them. The next 16 rows of A lie a_apart
// words behind the first ones, the next 16 columns of B right behind those of the same tile. Numbers of A are sums of Q, of B
// of P.
template <int R, int V, int Q, int P>
inline void UnitTile(int64_t count, const uint32_t* a, int64_t a_apart, const uint32_t* b, float* c, int64_t c_row,
                     bool add) {
  const int64_t row = c_row * sizeof(float);
  const auto of = [&](int a_tile, int b_tile) { return c + (a_tile - 4) * kSide * c_row + (b_tile - 6) * kSide; };
// The tiles' names are letters of the instructions: 0 to 3 of C, 4 and 5 of A, 6 and 7 of B.
#define EACH(DO)                   \
  DO(0, 4, 6)                      \
  if constexpr (V > 1) DO(1, 4, 7) \
  if constexpr (R > 1) DO(2, 5, 6) \
  if constexpr (R > 1 && V > 1) DO(3, 5, 7)
#define LOAD(C, A, B) _tile_loadd(C, of(A, B), row);
#define ZERO(C, A, B) _tile_zero(C);
#define STORE(C, A, B) _tile_stored(C, of(A, B), row);
#define TIMES(C, A, B) _tile_dpbf16ps(C, A, B);
#define LEFT(THIRD)                       \
  _tile_loadd(4, a + THIRD * kWords, 64); \
  if constexpr (R > 1) _tile_loadd(5, a + a_apart + THIRD * kWords, 64);
#define RIGHT(THIRD)                      \
  _tile_loadd(6, b + THIRD * kWords, 64); \
  if constexpr (V > 1) _tile_loadd(7, b + kThirds + THIRD * kWords, 64);
  if (add) {
    EACH(LOAD)
  } else {
    EACH(ZERO)
  }
  for (int64_t k = 0; k < count; ++k, a += kThirds, b += 2 * kThirds) {
    if constexpr (P == 3) {
      LEFT(0) RIGHT(2) EACH(TIMES)
      RIGHT(1) EACH(TIMES)
    }
    if constexpr (P == 3 && Q == 3) {
      LEFT(1) EACH(TIMES)
    }
    RIGHT(0)
    if constexpr (Q == 3) {
      if constexpr (P == 1) {
        LEFT(1) EACH(TIMES)
      } else {
        EACH(TIMES)
      }
      LEFT(2) EACH(TIMES)
    }
    LEFT(0) EACH(TIMES)
  }
  EACH(STORE)
#undef EACH
#undef LOAD
#undef ZERO
#undef STORE
#undef TIMES
#undef LEFT
#undef RIGHT
}

}  // namespace native
