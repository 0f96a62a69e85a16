// Linear maps of many rows or of few on a CPU, and the gradients of their weights.
//
// A weight is packed once, by whoever is free; then threads take some rows each. A weight's gradient is a product over all
// rows: threads take a part of the rows and a block of the gradient each, and whoever is the last at a block sums the parts.

#include <thread>

#include "calls.h"
#include "products.h"

using namespace native;

namespace {

constexpr int64_t kSome = 8 * kRows;               // rows of a unit of work
constexpr int64_t kWide = 8 * kPanel;              // columns that are packed in a unit of work
constexpr int64_t kSlice = kDeep > 1 ? 256 : 128;  // rows that a gradient's block reads at once
constexpr int64_t kEdge = 512;                     // of such a block, at most
constexpr int64_t kNarrow = 4 * kPanel;            // and at least, before its rows are parted
// Columns that few rows are multiplied by at once: few of a narrow map, for all threads to have some; more of a wide one, whose
// rows lie on pages of memory of their own.
constexpr int64_t kChunk = 256, kWidest = 1024, kUnits = 4;

// to [rows, columns] = the sum of so many matrices that lie so many numbers apart; rows of all are `row` numbers apart.
void SumParts(const float* parts, int64_t count, int64_t apart, int64_t rows, int64_t columns, int64_t row, float* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vector all = {};
      for (int64_t p = 0; p < count; ++p) all += Some(parts + p * apart + i * row + j, columns - j);
      Store(all, to + i * row + j, columns - j);
    }
}

// Few rows: y = x w, where w [depth, width] is read where it lies. Threads take some columns and a part of the inner dimension
// each; apart [parts, M, width] is room for what parts come to, unless it is one.
template <typename T>
void FewRows(ffi::ThreadPool& pool, const float* x, const T* w, float* y, float* apart, int64_t parts, int64_t M, int64_t depth,
             int64_t width) {
  const int64_t least = std::max((width + kWidest - 1) / kWidest, std::min(kUnits, (width + kChunk - 1) / kChunk));
  // All of a length, and as many as two threads share.
  const int64_t even = least > 1 ? Whole(least, 2) : 1;
  const int64_t wide = Whole((width + even - 1) / even), chunks = (width + wide - 1) / wide, deep = (depth + parts - 1) / parts;
  const std::unique_ptr<std::atomic<int64_t>[]> missing(new std::atomic<int64_t>[chunks]);
  for (int64_t i = 0; i < chunks; ++i) missing[i] = parts;
  ForAll(pool, chunks * parts, [&](int64_t unit) {
    const int64_t chunk = unit / parts, part = unit % parts, j = chunk * wide, columns = std::min(wide, width - j);
    const int64_t k = std::min(depth, part * deep), some = std::min(deep, depth - k);
    float* to = (parts > 1 ? apart + part * M * width : y) + j;
    for (int64_t m = 0; m < M; m += kRows)
      Multiply<T>({x + m * depth + k, depth, 1}, {w + k * width + j, width, 1}, to + m * width, width,
                  std::min<int64_t>(kRows, M - m), columns, some);
    if (--missing[chunk] > 0 || parts == 1) return;
    SumParts(apart + j, parts, M * width, M, columns, width, y + j);
  });
}

// y [M, width] = x [M, depth] w [depth, width], or its transpose: w [width, depth]. room: for w in whole panels, or, of few
// rows, what `FewRows` has `apart`. halves: whether all numbers of x are those of bfloat16. T: what a number of w is in memory.
template <typename T, ffi::DataType Type>
ffi::Error Linear(ffi::ThreadPool pool, Floats x, ffi::Buffer<Type> w, ffi::Result<Floats> y, ffi::Result<Floats> room,
                  bool transpose, bool halves) {
  const int64_t M = x.dimensions()[0], depth = x.dimensions()[1], width = y->dimensions()[1];
  const float* xs = x.typed_data();
  float *ys = y->typed_data(), *panels = room->typed_data();
  const T* ws = reinterpret_cast<const T*>(w.untyped_data());
  if (room->dimensions().size() == 3) {
    FewRows(pool, xs, ws, ys, panels, room->dimensions()[0], M, depth, width);
    return ffi::Error::Success();
  }
  const Matrix<T> b = transpose ? Matrix<T>{ws, 1, depth} : Matrix<T>{ws, width, 1};
  const int64_t packs = (width + kWide - 1) / kWide, blocks = (M + kSome - 1) / kSome;
  std::atomic<int64_t> missing{packs};
  ForAll(pool, packs + blocks, [&](int64_t i) {
    if (i < packs) {
      const int64_t j = i * kWide;
      PackWhole(Matrix<T>{b.at(0, j), b.row, b.column}, depth, std::min(kWide, width - j), panels + PanelsRoom(depth, j));
      --missing;
      return;
    }
    // Threads that pack took that before this unit, and wait for nobody.
    while (missing > 0) std::this_thread::yield();
    const int64_t first = (i - packs) * kSome, some = std::min(kSome, M - first);
    ProductOfWhole<T>({xs + first * depth, depth, 1}, panels, ys + first * width, width, some, width, depth, halves);
  });
  return ffi::Error::Success();
}

// o [D, Z] = x [M, D] transposed times y [M, Z]. parts [P, D, Z]: room for what P parts of the rows come to, unless it is
// one; how many changes bits, who takes them does not.
ffi::Error WeightGradient(ffi::ThreadPool pool, Floats x, Floats y, ffi::Result<Floats> o, ffi::Result<Floats> parts,
                          bool halves) {
  const int64_t M = x.dimensions()[0], D = x.dimensions()[1], Z = y.dimensions()[1], wanted = 3 * Threads(pool);
  const int64_t P = std::max<int64_t>(1, parts->dimensions()[0]), own_rows = Whole((M + P - 1) / P, kSlice);
  const float *xs = x.typed_data(), *ys = y.typed_data();
  int64_t rows = std::min(kEdge, D), columns = std::min(kEdge, Z);
  const auto units = [&] { return P * ((D + rows - 1) / rows) * ((Z + columns - 1) / columns); };
  while (units() < wanted && columns > kNarrow) columns = Whole(columns / 2);
  while (units() < wanted && rows > kSome) rows = Whole(rows / 2, kTall);
  const int64_t across = (Z + columns - 1) / columns, blocks = across * ((D + rows - 1) / rows);
  const std::unique_ptr<std::atomic<int64_t>[]> missing(new std::atomic<int64_t>[blocks]);
  for (int64_t i = 0; i < blocks; ++i) missing[i] = P;
  ForAll(pool, units(), [&](int64_t unit) {
    const int64_t block = unit / P, part = unit % P, d = block / across * rows, z = block % across * columns;
    const int64_t height = std::min(rows, D - d), width = std::min(columns, Z - z), x_row = height + kLanes;
    float* sums = (P > 1 ? parts->typed_data() + part * D * Z : o->typed_data()) + d * Z + z;
    thread_local std::vector<float> space;
    const int64_t packed = PanelsRoom(kSlice, kEdge);
    float *panels = Room(space, packed + kSlice * (kEdge + kLanes)), *own = panels + packed;
    const int64_t first = part * own_rows, end = std::min(M, first + own_rows);
    if (first >= end)
      for (int64_t i = 0; i < height; ++i) std::memset(sums + i * Z, 0, width * sizeof(float));
    for (int64_t m = first; m < end; m += kSlice) {
      const int64_t some = std::min(kSlice, end - m);
      PackWhole(Matrix<float>{ys + m * Z + z, Z, 1}, some, width, panels);
      // Copied, they are in a cache, and no power of two apart.
      for (int64_t i = 0; i < some; ++i) std::memcpy(own + i * x_row, xs + (m + i) * D + d, height * sizeof(float));
      for (int64_t i = 0; i < height; i += kBlock)
        Product(Ready({own + i, 1, x_row}, std::min(kBlock, height - i), some, halves), panels, PanelRoom(some), width,
                sums + i * Z, Z, m > first);
    }
    if (--missing[block] > 0 || P == 1) return;
    SumParts(parts->typed_data() + d * Z + z, P, D * Z, height, width, Z, o->typed_data() + d * Z + z);
  });
  return ffi::Error::Success();
}

}  // namespace

#define LINEAR_OF(NAME, TYPE, FFI_TYPE)                           \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, (Linear<TYPE, FFI_TYPE>),   \
                                ffi::Ffi::Bind()                  \
                                    .Ctx<ffi::ThreadPool>()       \
                                    .Arg<Floats>()                \
                                    .Arg<ffi::Buffer<FFI_TYPE>>() \
                                    .Ret<Floats>()                \
                                    .Ret<Floats>()                \
                                    .Attr<bool>("transpose")      \
                                    .Attr<bool>("halves"))

LINEAR_OF(LinearFloat32, float, ffi::F32);
LINEAR_OF(LinearBfloat16, Bfloat16, ffi::BF16);
LINEAR_OF(LinearBits, Bfloat16, ffi::U16);
XLA_FFI_DEFINE_HANDLER_SYMBOL(LinearGradient, WeightGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<bool>("halves"));
