// The tiles of all products, and the products by a matrix that is read where it lies.
//
// A tile of C is kept in vector registers while one pass over the inner dimension adds to it: R rows by V vectors of
// columns. Where there are more rows than a tile has, the matrix's columns are packed first, a tile's width at a time, so
// that a pass reads memory in order; where there are no more, they go over the matrix as it lies (`Few`).

#include "products.h"

namespace native {
namespace {

constexpr int64_t kFetched = 1 << 15;   // bytes that are fetched into a core's caches at once for few rows

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
TileOf Tiles(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr TileOf tiles[] = {Tile<R + 1, kPanel / kLanes, float>...};
  return tiles[rows - 1];
}

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

}  // namespace

TileOf PanelTile(int64_t rows) { return Tiles(rows, std::make_integer_sequence<int, kRows>()); }

template <typename T>
void Multiply(const Matrix<float>& a, const Matrix<T>& b, float* c, int64_t c_row, int64_t rows, int64_t columns,
              int64_t depth) {
  thread_local std::vector<float> space;
  float* panel = Room(space, kDepth * kPanel);
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
      Strip(rows, part, a.at(0, k), a.row, a.column, panel, c + j, c_row, width, k > 0);
    }
  }
}

template void Multiply(const Matrix<float>&, const Matrix<float>&, float*, int64_t, int64_t, int64_t, int64_t);
template void Multiply(const Matrix<float>&, const Matrix<Bfloat16>&, float*, int64_t, int64_t, int64_t, int64_t);

}  // namespace native
