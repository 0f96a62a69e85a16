// Grouped matmul in float32 on a CPU: rows sorted by group, each times its group's matrix. See native.py.
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

// C[i, j] (+)= sum over k of A(i, k) B(k, j), with i < R and j < V * kLanes.
template <int R, int V>
void Tile(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_depth, float* c,
          int64_t c_row, bool add) {
  Vector sum[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[i][v] = add ? *(const Vector*)(c + i * c_row + v * kLanes) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = *(const Vector*)(b + k * b_depth + v * kLanes);
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

using TileFunction = void (*)(int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool);

template <int V, int... R>
TileFunction Chosen(int rows, std::integer_sequence<int, R...>) {
  static constexpr TileFunction tiles[] = {Tile<R + 1, V>...};
  return tiles[rows - 1];
}

// A matrix of the product: element (i, j) at data[i * row + j * column].
struct Matrix {
  const float* data;
  int64_t row, column;
  const float* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

// C [rows, columns] = A [rows, depth] B [depth, columns]; rows of C are contiguous.
void Multiply(const Matrix& a, const Matrix& b, float* c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth) {
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
  constexpr int kFew = kRows / 4, kWide = 4 * 2 * kLanes;
  if (rows <= kFew && b.column == 1)
    for (; j + kWide <= columns; j += kWide)
      Chosen<8>(rows, std::make_integer_sequence<int, kFew>())(depth, a.data, a.row, a.column, b.at(0, j), b.row,
                                                               c + j, c_row, false);
  const bool packed = rows > kRows || b.column != 1;
  for (; j < columns; j += kPanel) {
    const int64_t width = std::min<int64_t>(kPanel, columns - j);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t part = std::min(kDepth, depth - k);
      const float* from = b.at(k, j);
      int64_t from_row = b.row;
      if (packed || width < kPanel) {
        if (b.column == 1) {
          for (int64_t p = 0; p < part; ++p) {
            std::memcpy(panel + p * kPanel, from + p * b.row, width * sizeof(float));
            if (width < kPanel) std::memset(panel + p * kPanel + width, 0, (kPanel - width) * sizeof(float));
          }
        } else {
          if (width < kPanel) std::memset(panel, 0, part * kPanel * sizeof(float));
          for (int64_t p0 = 0; p0 < part; p0 += 16)
            for (int64_t q = 0; q < width; ++q)
              for (int64_t p = p0; p < std::min(part, p0 + 16); ++p)
                panel[p * kPanel + q] = from[p * b.row + q * b.column];
        }
        from = panel;
        from_row = kPanel;
      }
      for (int64_t i = 0; i < rows; i += kRows) {
        const int some = std::min<int64_t>(kRows, rows - i);
        const TileFunction tile = Chosen<2>(some, std::make_integer_sequence<int, kRows>());
        if (width == kPanel) {
          tile(part, a.at(i, k), a.row, a.column, from, from_row, c + i * c_row + j, c_row, k > 0);
        } else {
          if (k > 0)
            for (int r = 0; r < some; ++r) std::memcpy(edge + r * kPanel, c + (i + r) * c_row + j, width * sizeof(float));
          tile(part, a.at(i, k), a.row, a.column, from, from_row, edge, kPanel, k > 0);
          for (int r = 0; r < some; ++r) std::memcpy(c + (i + r) * c_row + j, edge + r * kPanel, width * sizeof(float));
        }
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

// y [M, Z] = x [M, D] w[group] [D, Z], or its transpose: x [M, Z], y [M, D].
ffi::Error Rows(ffi::ThreadPool pool, Floats x, Floats w, ffi::Buffer<ffi::S32> sizes, ffi::Result<Floats> y,
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
  const float *xs = x.typed_data(), *ws = w.typed_data();
  float* ys = y->typed_data();
  std::memset(ys + first * width, 0, (M - first) * width * sizeof(float));
  ForAll(pool, units.size(), [&](int64_t i) {
    const Unit& u = units[i];
    const float* matrix = ws + u.group * D * Z;
    const Matrix b = transpose ? Matrix{matrix + u.column * Z, 1, Z} : Matrix{matrix + u.column, Z, 1};
    Multiply({xs + u.first * depth, depth, 1}, b, ys + u.first * width + u.column, width, u.rows, u.columns, depth);
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
    Multiply({xs + u.first * D + u.row, 1, D}, {ys + u.first * Z, Z, 1}, os + (u.group * D + u.row) * Z, Z, u.rows, Z,
             u.depth);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedRows, Rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<Floats>()
                                  .Attr<bool>("transpose"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedOuter, Outer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<Floats>());
