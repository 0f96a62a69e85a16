// What compiled code for a CPU is made of: vectors of float32, the exponential function, tiles of a product in registers,
// packed matrices, and work for all threads. See native.py.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

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
  return (Vector)(__builtin_convertvector(*(const Halves*)from, Words) << 16);
}
inline float Value(float x) { return x; }
inline float Value(Bfloat16 x) {
  const uint32_t word = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
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

// C[i, j] (+)= sum over k of A(i, k) B(k, j), with i < R and j < V * kLanes.
template <int R, int V, typename T>
void Tile(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth, float* c,
          int64_t c_row, bool add) {
  Vector sum[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[i][v] = add ? Loaded(c + i * c_row + v * kLanes) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = Loaded(b + k * b_depth + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const float x = a[i * a_row + k * a_depth];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[i][v] += x * row[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) *(Vector*)(c + i * c_row + v * kLanes) = sum[i][v];
}

template <int... R>
auto PanelTile(int rows, std::integer_sequence<int, R...>) {
  using TileOf = void (*)(int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool);
  static constexpr TileOf tiles[] = {Tile<R + 1, kPanel / kLanes, float>...};
  return tiles[rows - 1];
}

// C [rows, kPanel] (+)= A [rows, depth] B, where B is packed.
inline void Times(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* panel,
                  float* c, int64_t c_row, bool add) {
  for (int64_t i = 0; i < rows; i += kRows) {
    const auto tile = PanelTile(std::min<int64_t>(kRows, rows - i), std::make_integer_sequence<int, kRows>());
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

// A panel's width of a matrix in float32, zeros where it has fewer columns.
template <typename T>
void Pack(const Matrix<T>& b, int64_t depth, int64_t width, float* panel) {
  if (width < kPanel) std::memset(panel, 0, depth * kPanel * sizeof(float));
  if (b.column == 1) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < width; ++j) panel[k * kPanel + j] = Value(b.data[k * b.row + j]);
    return;
  }
  // By lines of memory.
  for (int64_t begin = 0; begin < depth; begin += 16)
    for (int64_t j = 0; j < width; ++j)
      for (int64_t k = begin; k < std::min(depth, begin + 16); ++k)
        panel[k * kPanel + j] = Value(b.data[k * b.row + j * b.column]);
}

// All columns of a matrix, panel after panel.
template <typename T>
void PackAll(const Matrix<T>& b, int64_t depth, int64_t width, float* panels) {
  for (int64_t j = 0; j < width; j += kPanel)
    Pack(Matrix<T>{b.at(0, j), b.row, b.column}, depth, std::min<int64_t>(kPanel, width - j), panels + j * depth);
}

// Those that units run on: the pool's, or where XLA has none this one alone.
int64_t Threads(const ffi::ThreadPool& pool) { return std::max<int64_t>(1, pool.num_threads()); }

// Runs units 0 .. count - 1 on this thread and the pool's; returns when all are done.
void ForAll(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> run) {
  struct State {
    std::function<void(int64_t)> run;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all;
    void Work() {
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        run(i);
        if (done.fetch_add(1) + 1 == count) {
          std::lock_guard<std::mutex> lock(mutex);
          all.notify_all();
        }
      }
    }
  };
  auto state = std::make_shared<State>();
  state->run = std::move(run);
  state->count = count;
  const int64_t helpers = std::min<int64_t>(Threads(pool), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->Work(); });
  state->Work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all.wait(lock, [&] { return state->done.load() == count; });
}

}  // namespace
