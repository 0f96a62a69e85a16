// Grouped matmul on a CPU: rows sorted by group, each times its group's matrix.
//
// Units of work (some rows of a group, some columns) are taken by the calling thread and by those of XLA's pool, whoever is
// free.

#include "calls.h"
#include "products.h"

using namespace native;

namespace {

constexpr int64_t kChunk = 512;  // columns of a unit of work

struct Unit {
  int64_t group, first, rows, column, columns;
};

// y [M, Z] = x [M, D] w[group] [D, Z], or its transpose: x [M, Z], y [M, D]. T: what a number of w is in memory.
template <typename T, ffi::DataType Type>
ffi::Error Grouped(ffi::ThreadPool pool, Floats x, ffi::Buffer<Type> w, Ints sizes, ffi::Result<Floats> y,
                bool transpose) {
  const auto xd = x.dimensions(), wd = w.dimensions(), yd = y->dimensions();
  const int64_t M = xd[0], depth = xd[1], width = yd[1], E = wd[0], D = wd[1], Z = wd[2];
  const int32_t* size = sizes.typed_data();
  // Where a group has few rows, its matrix' rows are parted only as far as all threads need it to have work.
  const int64_t groups = std::max<int64_t>(1, std::count_if(size, size + E, [](int32_t n) { return n > 0; }));
  const int64_t parts = (2 * Threads(pool) + groups - 1) / groups;
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
ffi::Error Outer(ffi::ThreadPool pool, Floats x, Floats y, Ints sizes, ffi::Result<Floats> o) {
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
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, (Grouped<TYPE, FFI_TYPE>),      \
                                ffi::Ffi::Bind()                   \
                                    .Ctx<ffi::ThreadPool>()        \
                                    .Arg<Floats>()                 \
                                    .Arg<ffi::Buffer<FFI_TYPE>>()  \
                                    .Arg<Ints>()                  \
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
                                  .Arg<Ints>()
                                  .Ret<Floats>());
