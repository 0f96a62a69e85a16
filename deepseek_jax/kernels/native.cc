// Grouped matmul on a CPU: rows sorted by group, each times its group's matrix, of float32 or bfloat16. See native.py.
//
// A tile of C is kept in vector registers while one pass over the inner dimension adds to it: R rows by V vectors of
// columns. Where a group has more rows than a tile, the matrix's columns are packed first, a tile's width at a time, so
// that a pass reads memory in order; where it has no more, they go over the matrix as it lies (`Few`). Units of work
// (some rows of a group, some columns) are taken by the calling thread and by those of XLA's pool, whoever is free.

#include "native_tiles.h"

namespace {

constexpr int64_t kFetched = 1 << 15;   // bytes that are fetched into a core's caches at once for few rows
constexpr int64_t kFits = 1 << 19;      // bytes of a matrix that are fetched at once for more
constexpr int64_t kDepth = 512;         // of the inner dimension, packed at once
constexpr int64_t kBlock = 16 * kRows;  // rows of a unit of work
constexpr int64_t kChunk = 512;         // columns of a unit of work

// C [columns] (+)= a [depth] B [depth, columns], B read strictly in the order of memory. C stays in the first cache.
template <typename T>
void Stream(int64_t depth, int64_t columns, const float* a, int64_t a_depth, const T* b, int64_t b_depth, float* c,
            bool add) {
  if (!add) std::memset(c, 0, columns * sizeof(float));
  for (int64_t k = 0; k < depth; ++k, b += b_depth) {
    const float x = a[k * a_depth];
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) *(Vector*)(c + j) += x * Loaded(b + j);
    for (; j < columns; ++j) c[j] += x * Value(b[j]);
  }
}

// C [1 + R, columns] = A [1 + R, depth] B [depth, columns], of a matrix that is in no cache: some rows of it at a time
// are fetched by a `Stream`, which is twice as fast as to fetch them by the strips of columns that tiles go through.
template <int R, typename T>
void Few(int64_t depth, int64_t columns, const float* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth,
         float* c, int64_t c_row) {
  const int64_t some = std::max<int64_t>(kFetched / (columns * sizeof(T)), 1);
  for (int64_t k = 0; k < depth; k += some, a += some * a_depth, b += some * b_depth) {
    const int64_t part = std::min(some, depth - k);
    Stream(part, columns, a, a_depth, b, b_depth, c, k > 0);
    if constexpr (R > 0) {
      constexpr int V = std::clamp(kLanes / R, 2, 8);
      int64_t j = 0;
      for (; j + V * kLanes <= columns; j += V * kLanes)
        Tile<R, V>(part, a + a_row, a_row, a_depth, b + j, b_depth, c + c_row + j, c_row, k > 0);
      for (; j + kLanes <= columns; j += kLanes)
        Tile<R, 1>(part, a + a_row, a_row, a_depth, b + j, b_depth, c + c_row + j, c_row, k > 0);
      if (j < columns)
        for (int i = 1; i <= R; ++i)
          Stream(part, columns - j, a + i * a_row, a_depth, b + j, b_depth, c + i * c_row + j, k > 0);
    }
  }
}

template <typename T, int... R>
auto FewOf(int rows, std::integer_sequence<int, R...>) {
  using Function = void (*)(int64_t, int64_t, const float*, int64_t, int64_t, const T*, int64_t, float*, int64_t);
  static constexpr Function functions[] = {Few<R, T>...};
  return functions[rows - 1];
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

// C [rows, columns] = A [rows, depth] B [depth, columns], with at most kBlock rows; rows of C are contiguous.
template <typename T>
void Multiply(const Matrix<float>& a, const Matrix<T>& b, float* c, int64_t c_row, int64_t rows, int64_t columns,
              int64_t depth) {
  thread_local std::vector<float> space;
  space.resize((kDepth + kBlock) * kPanel);
  float* panel = space.data();
  float* edge = panel + kDepth * kPanel;
  if (depth == 0) {
    for (int64_t i = 0; i < rows; ++i) std::memset(c + i * c_row, 0, columns * sizeof(float));
    return;
  }
  if (rows <= kRows && b.column == 1) {
    FewOf<T>(rows, std::make_integer_sequence<int, kRows>())(depth, columns, a.data, a.row, a.column, b.data, b.row, c,
                                                             c_row);
    return;
  }
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t part = std::min(kDepth, depth - k);
    Fetch(Matrix<T>{b.at(k, 0), b.row, b.column}, part, columns);
    for (int64_t j = 0; j < columns; j += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, columns - j);
      Pack(Matrix<T>{b.at(k, j), b.row, b.column}, part, width, panel);
      float* to = c + j;
      if (width == kPanel) {
        Times(rows, part, a.at(0, k), a.row, a.column, panel, to, c_row, k > 0);
        continue;
      }
      for (int64_t i = 0; k > 0 && i < rows; ++i) std::memcpy(edge + i * kPanel, to + i * c_row, width * sizeof(float));
      Times(rows, part, a.at(0, k), a.row, a.column, panel, edge, kPanel, k > 0);
      for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * c_row, edge + i * kPanel, width * sizeof(float));
    }
  }
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
  // Where a group has few rows, its matrix' rows are parted only as far as all threads need it to have work.
  const int64_t groups = std::max<int64_t>(1, std::count_if(size, size + E, [](int32_t n) { return n > 0; }));
  const int64_t parts = (2 * pool.num_threads() + groups - 1) / groups;
  const int64_t stretch = std::max(kChunk, (width / parts + kLanes - 1) / kLanes * kLanes);
  std::vector<Unit> units;
  int64_t first = 0;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t end = std::min<int64_t>(M, first + size[e]);
    const int64_t chunk = end - first <= kRows && !transpose ? stretch : kChunk;
    for (; first < end; first += kBlock)
      for (int64_t j = 0; j < width; j += chunk)
        units.push_back({e, first, std::min(kBlock, end - first), j, std::min(chunk, width - j)});
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
