// Grouped matmul on a CPU: rows sorted by group, each times its group's matrix, of float32 or bfloat16. See native.py.
//
// A tile of C is kept in vector registers while one pass over the inner dimension adds to it: R rows by V vectors of
// columns. Where a group has more rows than a tile, the matrix's columns are packed first, a
// tile's width at a time, so that a pass reads memory in order. Units of work (some rows of a group, some columns)
// are taken by the calling thread and by those of XLA's pool, whoever is free.

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

#ifdef __AVX512F__
constexpr int kLanes = 16, kRows = 12;
#else
constexpr int kLanes = 8, kRows = 6;
#endif
constexpr int kPanel = 2 * kLanes;      // columns of a packed panel
constexpr int64_t kDepth = 512;         // of the inner dimension, packed at once
constexpr int64_t kBlock = 16 * kRows;  // rows of a unit of work
constexpr int64_t kChunk = 512;         // columns of a unit of work

typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
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

// C[i, j] (+)= sum over k of A(i, k) B(k, j), with i < R and j < V * kLanes.
template <int R, int V, typename T>
void Tile(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth, float* c,
          int64_t c_row, bool add) {
  Vector sum[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[i][v] = add ? *(const Vector*)(c + i * c_row + v * kLanes) : Vector{};
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

template <typename T>
using TileOf = void (*)(int64_t, const float*, int64_t, int64_t, const T*, int64_t, float*, int64_t, bool);

template <int V, typename T, int... R>
TileOf<T> Chosen(int rows, std::integer_sequence<int, R...>) {
  static constexpr TileOf<T> tiles[] = {Tile<R + 1, V, T>...};
  return tiles[rows - 1];
}

template <int V, int Most, typename T>
TileOf<T> TileFor(int rows) {
  return Chosen<V, T>(rows, std::make_integer_sequence<int, Most>());
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

// C [rows, columns] = A [rows, depth] B [depth, columns]; rows of C are contiguous.
template <typename T>
void Multiply(const Matrix<float>& a, const Matrix<T>& b, float* c, int64_t c_row, int64_t rows, int64_t columns,
              int64_t depth) {
  thread_local std::vector<float> space;
  space.resize(kDepth * kPanel + kRows * kPanel);
  float* panel = space.data();
  float* edge = panel + kDepth * kPanel;
  if (depth == 0) {
    for (int64_t i = 0; i < rows; ++i) std::memset(c + i * c_row, 0, columns * sizeof(float));
    return;
  }
  int64_t j = 0;
  // So few rows read the matrix once: as it is, in wide strips.
  constexpr int kFew = kRows / 4, kWide = 8 * kLanes;
  if (rows <= kFew && b.column == 1)
    for (; j + kWide <= columns; j += kWide)
      TileFor<8, kFew, T>(rows)(depth, a.data, a.row, a.column, b.at(0, j), b.row, c + j, c_row, false);
  for (; j < columns; j += kPanel) {
    const int64_t width = std::min<int64_t>(kPanel, columns - j);
    const bool packed = rows > kRows || b.column != 1 || width < kPanel;
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t part = std::min(kDepth, depth - k);
      if (packed) Pack(Matrix<T>{b.at(k, j), b.row, b.column}, part, width, panel);
      for (int64_t i = 0; i < rows; i += kRows) {
        const int some = std::min<int64_t>(kRows, rows - i);
        float* to = c + i * c_row + j;
        if (!packed) {
          TileFor<2, kRows, T>(some)(part, a.at(i, k), a.row, a.column, b.at(k, j), b.row, to, c_row, k > 0);
          continue;
        }
        const TileOf<float> tile = TileFor<2, kRows, float>(some);
        if (width == kPanel) {
          tile(part, a.at(i, k), a.row, a.column, panel, kPanel, to, c_row, k > 0);
          continue;
        }
        if (k > 0)
          for (int r = 0; r < some; ++r) std::memcpy(edge + r * kPanel, to + r * c_row, width * sizeof(float));
        tile(part, a.at(i, k), a.row, a.column, panel, kPanel, edge, kPanel, k > 0);
        for (int r = 0; r < some; ++r) std::memcpy(to + r * c_row, edge + r * kPanel, width * sizeof(float));
      }
    }
  }
}

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
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->Work(); });
  state->Work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all.wait(lock, [&] { return state->done.load() == count; });
}

struct Unit {
  int64_t group, first, rows, column, columns;
};

using Floats = ffi::Buffer<ffi::F32>;

// y [M, Z] = x [M, D] w[group] [D, Z], or its transpose: x [M, Z], y [M, D]. T: what a number of w is in memory.
template <typename T, ffi::DataType Type>
ffi::Error Rows(ffi::ThreadPool pool, Floats x, ffi::Buffer<Type> w, ffi::Buffer<ffi::S32> sizes, ffi::Result<Floats> y,
                bool transpose) {
  const auto xd = x.dimensions(), wd = w.dimensions(), yd = y->dimensions();
  const int64_t M = xd[0], depth = xd[1], width = yd[1], E = wd[0], D = wd[1], Z = wd[2];
  const int32_t* size = sizes.typed_data();
  std::vector<Unit> units;
  int64_t first = 0;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t end = std::min<int64_t>(M, first + size[e]);
    for (; first < end; first += kBlock)
      for (int64_t j = 0; j < width; j += kChunk)
        units.push_back({e, first, std::min(kBlock, end - first), j, std::min(kChunk, width - j)});
    first = end;
  }
  const float* xs = x.typed_data();
  const T* ws = reinterpret_cast<const T*>(w.untyped_data());
  float* ys = y->typed_data();
  std::memset(ys + first * width, 0, (M - first) * width * sizeof(float));
  ForAll(pool, units.size(), [&](int64_t i) {
    const Unit& u = units[i];
    const T* matrix = ws + u.group * D * Z;
    const Matrix<T> b = transpose ? Matrix<T>{matrix + u.column * Z, 1, Z} : Matrix<T>{matrix + u.column, Z, 1};
    Multiply<T>({xs + u.first * depth, depth, 1}, b, ys + u.first * width + u.column, width, u.rows, u.columns, depth);
  });
  return ffi::Error::Success();
}

// o [E, D, Z] = x[rows of e].T y[rows of e].
ffi::Error Outer(ffi::ThreadPool pool, Floats x, Floats y, ffi::Buffer<ffi::S32> sizes, ffi::Result<Floats> o) {
  const auto xd = x.dimensions(), yd = y.dimensions();
  const int64_t M = xd[0], D = xd[1], Z = yd[1], E = sizes.element_count();
  const int32_t* size = sizes.typed_data();
  struct Part {
    int64_t group, first, depth, row, rows;
  };
  std::vector<Part> units;
  for (int64_t e = 0, first = 0; e < E; ++e) {
    const int64_t end = std::min<int64_t>(M, first + size[e]);
    for (int64_t d = 0; d < D; d += kBlock) units.push_back({e, first, end - first, d, std::min(kBlock, D - d)});
    first = end;
  }
  const float *xs = x.typed_data(), *ys = y.typed_data();
  float* os = o->typed_data();
  ForAll(pool, units.size(), [&](int64_t i) {
    const Part& u = units[i];
    Multiply<float>({xs + u.first * D + u.row, 1, D}, {ys + u.first * Z, Z, 1}, os + (u.group * D + u.row) * Z, Z, u.rows, Z,
             u.depth);
  });
  return ffi::Error::Success();
}

}  // namespace

#define ROWS_OF(NAME, TYPE, FFI_TYPE)                              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, (Rows<TYPE, FFI_TYPE>),      \
                                ffi::Ffi::Bind()                   \
                                    .Ctx<ffi::ThreadPool>()        \
                                    .Arg<Floats>()                 \
                                    .Arg<ffi::Buffer<FFI_TYPE>>()  \
                                    .Arg<ffi::Buffer<ffi::S32>>()  \
                                    .Ret<Floats>()                 \
                                    .Attr<bool>("transpose"))

ROWS_OF(GroupedRowsFloat32, float, ffi::F32);
ROWS_OF(GroupedRowsBfloat16, Bfloat16, ffi::BF16);
// The bits of bfloat16 numbers (`core.bits`).
ROWS_OF(GroupedRowsBits, Bfloat16, ffi::U16);
XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedOuter, Outer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<Floats>());
