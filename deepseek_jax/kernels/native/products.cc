// The tiles of all products, and the products by a matrix that is read where it lies.
//
// A tile of C is kept in vector registers while one pass over the inner dimension adds to it: R rows by V vectors of
// columns. Where there are more rows than a tile has, the matrix's columns are packed first, a tile's width at a time, so
// that a pass reads memory in order; where there are no more, they go over the matrix as it lies (`Few`).

#include "products.h"

#include <cmath>

namespace native {
namespace {

constexpr int64_t kAhead = 1 << 13;  // bytes of a matrix that few rows are multiplied by while the next are fetched
constexpr int64_t kLeast = 8;       // rows of it, at least
template <typename T>
constexpr int kLine = 64 / sizeof(T);  // numbers of a line of memory

// Begins to bring rows of a matrix into the first cache.
template <typename T>
void Ahead(const T* b, int64_t b_depth, int64_t rows, int64_t columns) {
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t j = 0; j < columns; j += kLine<T>) __builtin_prefetch(b + k * b_depth + j);
}

// C[i, j] (+)= sum over k of A(i, k) B(k, j), with i < R and j < V * kLanes. Fetching: what lies `next` numbers behind B is
// brought into the first cache.
template <int R, int V, typename T, bool Fetching>
void Tile(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth, float* c,
          int64_t c_row, bool add, int64_t next) {
  Vector sum[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[i][v] = add ? Loaded(c + i * c_row + v * kLanes) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = Loaded(b + k * b_depth + v * kLanes);
    if constexpr (Fetching)
#pragma GCC unroll 8
      for (int v = 0; v < V; v += kLine<T> / kLanes) __builtin_prefetch(b + k * b_depth + v * kLanes + next);
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

template <int R>
void OfPanel(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_depth, float* c,
             int64_t c_row, bool add) {
  Tile<R, kPanel / kLanes, float, false>(depth, a, a_row, a_depth, b, b_depth, c, c_row, add, 0);
}

template <int... R>
TileOf Tiles(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr TileOf tiles[] = {OfPanel<R + 1>...};
  return tiles[rows - 1];
}

// Of the last columns of a matrix, fewer than a vector.
template <int R, typename T>
void Rest(int64_t depth, int64_t columns, const float* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth, float* c,
          int64_t c_row, bool add) {
  for (int i = 0; i < R; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      float sum = add ? c[i * c_row + j] : 0;
      for (int64_t k = 0; k < depth; ++k) sum = std::fma(a[i * a_row + k * a_depth], Value(b[k * b_depth + j]), sum);
      c[i * c_row + j] = sum;
    }
}

// C [R, columns] = A [R, depth] B [depth, columns], of a matrix that is in no cache: tiles go over some rows of it after the
// other, and fetch those behind them meanwhile.
template <int R, typename T>
void Few(int64_t depth, int64_t columns, const float* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth,
         float* c, int64_t c_row) {
  constexpr int V = std::clamp(2 * kRows / R, 2, 8);
  const int64_t some = std::max<int64_t>(kAhead / (columns * sizeof(T)), kLeast);
  Ahead(b, b_depth, std::min(some, depth), columns);
  for (int64_t k = 0; k < depth; k += some, a += some * a_depth, b += some * b_depth) {
    const int64_t part = std::min(some, depth - k), next = k + some < depth ? some * b_depth : 0;
    int64_t j = 0;
    for (; j + V * kLanes <= columns; j += V * kLanes)
      Tile<R, V, T, true>(part, a, a_row, a_depth, b + j, b_depth, c + j, c_row, k > 0, next);
    for (; j + kLanes <= columns; j += kLanes)
      Tile<R, 1, T, true>(part, a, a_row, a_depth, b + j, b_depth, c + j, c_row, k > 0, next);
    Rest<R>(part, columns - j, a, a_row, a_depth, b + j, b_depth, c + j, c_row, k > 0);
  }
}

template <typename T, int... R>
auto FewOf(int rows, std::integer_sequence<int, R...>) {
  using Function = void (*)(int64_t, int64_t, const float*, int64_t, int64_t, const T*, int64_t, float*, int64_t);
  static constexpr Function functions[] = {Few<R + 1, T>...};
  return functions[rows - 1];
}

}  // namespace

TileOf PanelTile(int64_t rows) { return Tiles(rows, std::make_integer_sequence<int, kRows>()); }

#ifdef MATRIX_UNITS

Rows Ready(const Matrix<float>& a, int64_t rows, int64_t depth, bool halves) {
  thread_local std::vector<float> space;
  const int64_t deep = Whole(depth, kDeep) / kDeep, tall = Whole(rows, kSide) / kSide;
  uint32_t* tiles = (uint32_t*)Room(space, tall * deep * kThirds);
  const auto split = halves ? Split<true, 1, float> : Split<true, 3, float>;
  for (int64_t i = 0; i < tall; ++i)
    for (int64_t k = 0; k < deep; ++k)
      split(a.at(i * kSide, k * kDeep), a.row, a.column, std::min(kSide, rows - i * kSide),
            std::min(kDeep, depth - k * kDeep), tiles + (i * deep + k) * kThirds);
  return {rows, depth, tiles, halves};
}

template <int Q, typename T>
static void UnitProduct(const Rows& a, const float* panels, int64_t apart, int64_t columns, float* c, int64_t c_row, bool add) {
  const int64_t deep = Whole(a.depth, kDeep) / kDeep, a_apart = deep * kThirds;
  const UnitTiles tiles;
  for (int64_t j = 0; j < columns; j += kPanel, panels += apart)
    for (int64_t i = 0; i < a.rows; i += kTall) {
      const int64_t tall = std::min(kTall, a.rows - i), width = std::min<int64_t>(kPanel, columns - j);
      const bool two = tall > kSide, wide = width > kSide, whole = tall % kSide == 0 && width % kSide == 0;
      float* to = c + i * c_row + j;
      alignas(64) float edge[kTall * kPanel];
      for (int64_t r = 0; add && !whole && r < tall; ++r) std::memcpy(edge + r * kPanel, to + r * c_row, width * sizeof(float));
      constexpr int P = kParts<T>;
      const auto tile = two ? wide ? UnitTile<2, 2, Q, P> : UnitTile<2, 1, Q, P>
                            : wide ? UnitTile<1, 2, Q, P> : UnitTile<1, 1, Q, P>;
      tile(deep, a.tiles + i / kSide * a_apart, a_apart, (const uint32_t*)panels, whole ? to : edge, whole ? c_row : kPanel,
           add);
      for (int64_t r = 0; !whole && r < tall; ++r) std::memcpy(to + r * c_row, edge + r * kPanel, width * sizeof(float));
    }
}

template <typename T>
void Product(const Rows& a, const float* panels, int64_t apart, int64_t columns, float* c, int64_t c_row, bool add) {
  (a.halves ? UnitProduct<1, T> : UnitProduct<3, T>)(a, panels, apart, columns, c, c_row, add);
}

#else

Rows Ready(const Matrix<float>& a, int64_t rows, int64_t depth, bool) { return {rows, depth, a}; }

// C [rows, width] (+)= A [rows, depth] B, where B is packed, of at most a panel's width; at most kBlock rows.
static void Strip(const Matrix<float>& a, int64_t rows, int64_t depth, const float* panel, float* c, int64_t c_row,
                  int64_t width, bool add) {
  if (width == kPanel) {
    Times(rows, depth, a.data, a.row, a.column, panel, c, c_row, add);
    return;
  }
  float edge[kBlock * kPanel];
  for (int64_t i = 0; add && i < rows; ++i) std::memcpy(edge + i * kPanel, c + i * c_row, width * sizeof(float));
  Times(rows, depth, a.data, a.row, a.column, panel, edge, kPanel, add);
  for (int64_t i = 0; i < rows; ++i) std::memcpy(c + i * c_row, edge + i * kPanel, width * sizeof(float));
}

template <typename T>
void Product(const Rows& a, const float* panels, int64_t apart, int64_t columns, float* c, int64_t c_row, bool add) {
  for (int64_t k = 0; k < a.depth; k += kDepth)
    for (int64_t j = 0; j < columns; j += kPanel)
      Strip({a.a.at(0, k), a.a.row, a.a.column}, a.rows, std::min(kDepth, a.depth - k),
            panels + j / kPanel * apart + PanelRoom(k), c + j, c_row, std::min<int64_t>(kPanel, columns - j), add || k > 0);
}

#endif

template <typename T>
void Multiply(const Matrix<float>& a, const Matrix<T>& b, float* c, int64_t c_row, int64_t rows, int64_t columns,
              int64_t depth) {
  thread_local std::vector<float> space;
  if (depth == 0) {
    for (int64_t i = 0; i < rows; ++i) std::memset(c + i * c_row, 0, columns * sizeof(float));
    return;
  }
  if (rows <= kRows && b.column == 1) {
    FewOf<T>(rows, std::make_integer_sequence<int, kRows>())(depth, columns, a.data, a.row, a.column, b.data, b.row, c,
                                                             c_row);
    return;
  }
  float* panel = Room(space, PanelRoom(kDepth));
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t part = std::min(kDepth, depth - k);
    const Matrix<T> deep{b.at(k, 0), b.row, b.column};
    Fetch(deep, part, columns);
    const Rows ready = Ready({a.at(0, k), a.row, a.column}, rows, part);
    for (int64_t j = 0; j < columns; j += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, columns - j);
      PackPanels(Matrix<T>{deep.at(0, j), b.row, b.column}, part, width, panel, 0);
      Product<T>(ready, panel, 0, width, c + j, c_row, k > 0);
    }
  }
}

template void Product<float>(const Rows&, const float*, int64_t, int64_t, float*, int64_t, bool);
template void Product<Bfloat16>(const Rows&, const float*, int64_t, int64_t, float*, int64_t, bool);
template void Multiply(const Matrix<float>&, const Matrix<float>&, float*, int64_t, int64_t, int64_t, int64_t);
template void Multiply(const Matrix<float>&, const Matrix<Bfloat16>&, float*, int64_t, int64_t, int64_t, int64_t);

}  // namespace native
