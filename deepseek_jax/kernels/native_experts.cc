// The routed experts' networks on a CPU, without a gradient, in one call. See native.py.
//
// A unit of work takes some rows of one expert from the gathered inputs through both products; what lies between is in a
// core's cache, and so is the expert itself if it is small. Where there are fewer units than threads, an expert's inner
// width is parted too. Every assignment's output is kept apart, and a token's are summed in its own order by whoever
// computes the last of them: which thread takes what changes no bit.

#include <numeric>

#include "native_products.h"

namespace {

constexpr int64_t kLine = 16;           // numbers of a line of memory
constexpr int64_t kFewest = 4 * kRows;  // rows of a unit that are parted no further
constexpr int64_t kMost = 32 * kRows;   // rows of a unit whose expert is packed at once
constexpr int64_t kKept = 1 << 17;      // numbers of such an expert: half a megabyte, which a core's own cache holds

// Assignments to E experts in order of expert, those to nobody left out.
struct Sorted {
  std::vector<int64_t> starts;  // [E + 1], of the experts' places
  std::vector<int64_t> order;   // place -> assignment
  std::vector<int64_t> place;   // assignment -> place, -1 of nobody's

  Sorted(const int32_t* index, int64_t M, int64_t E) : starts(E + 1), place(M, -1) {
    const auto real = [&](int64_t m) { return index[m] >= 0 && index[m] < E; };
    for (int64_t m = 0; m < M; ++m)
      if (real(m)) ++starts[index[m] + 1];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    order.resize(starts[E]);
    std::vector<int64_t> next(starts);
    for (int64_t m = 0; m < M; ++m)
      if (real(m)) order[place[m] = next[index[m]]++] = m;
  }
};

// x = weight silu(x) up, with both factors cut off at the limit.
inline void Activate(float* x, const float* up, int64_t count, float limit, float weight) {
  const auto activated = [&](Vector gate, Vector factor) {
    gate = gate > limit ? Vector{} + limit : gate;
    factor = factor > limit ? Vector{} + limit : factor < -limit ? Vector{} - limit : factor;
    const Vector small = Exp(gate > 0.0f ? -gate : gate);
    return gate * (gate > 0.0f ? Vector{} + 1.0f : small) / (1.0f + small) * factor * weight;
  };
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) *(Vector*)(x + j) = activated(Loaded(x + j), Loaded(up + j));
  if (j == count) return;
  Vector rest[2] = {};
  std::memcpy(&rest[0], x + j, (count - j) * sizeof(float));
  std::memcpy(&rest[1], up + j, (count - j) * sizeof(float));
  rest[0] = activated(rest[0], rest[1]);
  std::memcpy(x + j, &rest[0], (count - j) * sizeof(float));
}

// Sorted rows of one expert, and where what is computed of them goes.
struct Block {
  const float *x, *weights;
  float* outputs;
  const int64_t* order;
  int64_t K, D, first, rows;

  const float* Input(int64_t r) const { return x + order[first + std::min(r, rows - 1)] / K * D; }
  float* Output(int64_t r) const { return outputs + (first + r) * D; }
  float Weight(int64_t r) const { return weights[order[first + r]]; }

  // to [some, D], whose rows are so many numbers apart: inputs from row `start` on.
  void Gather(int64_t start, int64_t some, int64_t apart, float* to) const {
    for (int64_t r = start; r < start + some; ++r, to += apart) {
      // Nothing but the order foretells where the next ones lie.
      for (int64_t j = 0; j < D; j += kLine) __builtin_prefetch(Input(r + 2) + j);
      std::memcpy(to, Input(r), D * sizeof(float));
    }
  }
};

// An expert, or a part of its inner width: gate [D, width], up F numbers behind it, in rows of 2F; down [width, D].
template <typename T>
struct Network {
  const T *gate, *down;
  int64_t D, F, width;
  float limit;

  bool Fits() const { return D * Whole(2 * width) + width * Whole(D) <= kKept; }

  // Any number of columns as whole panels.
  static int64_t Whole(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

  void Activated(const Block& block, int64_t start, int64_t some, float* h, int64_t apart) const {
    for (int64_t r = 0; r < some; ++r) Activate(h + r * apart, h + r * apart + width, width, limit, block.Weight(start + r));
  }

  // All rows, at most kBlock, through one product and then through the other.
  void Apply(const Block& block) const {
    // Rows are no power of two apart: those would share lines of the first cache.
    const int64_t x_row = D + kLanes, h_row = 2 * width + kLanes;
    thread_local std::vector<float> space;
    space.resize(block.rows * (x_row + h_row));
    float *x = space.data(), *h = x + block.rows * x_row;
    block.Gather(0, block.rows, x_row, x);
    // Gate and up are one matrix unless only a part of each is needed.
    const int64_t halves = width < F ? 2 : 1, columns = 2 * width / halves;
    for (int64_t half = 0; half < halves; ++half)
      Multiply<T>({x, x_row, 1}, {gate + half * F, 2 * F, 1}, h + half * width, h_row, block.rows, columns, D);
    Activated(block, 0, block.rows, h, h_row);
    Multiply<T>({h, h_row, 1}, {down, D, 1}, block.Output(0), D, block.rows, D, width);
  }

  // As `Apply`, of a whole expert that fits: it is packed, and a tile's rows go through both products in the first cache.
  void ApplyPacked(const Block& block) const {
    const int64_t x_row = D + kLanes, h_row = Whole(2 * F) + kLanes;
    thread_local std::vector<float> space;
    space.resize(kRows * (x_row + h_row) + kKept);
    float *x = space.data(), *h = x + kRows * x_row, *first = h + kRows * h_row, *second = first + D * Whole(2 * F);
    const Matrix<T> gate_up{gate, 2 * F, 1}, out{down, D, 1};
    Fetch(gate_up, D, 2 * F);
    PackAll(gate_up, D, 2 * F, first);
    Fetch(out, F, D);
    PackAll(out, F, D, second);
    for (int64_t start = 0; start < block.rows; start += kRows) {
      const int64_t some = std::min<int64_t>(kRows, block.rows - start);
      block.Gather(start, some, x_row, x);
      for (int64_t j = 0; j < 2 * F; j += kPanel) Times(some, D, x, x_row, 1, first + j * D, h + j, h_row, false);
      Activated(block, start, some, h, h_row);
      for (int64_t j = 0; j < D; j += kPanel)
        Strip(some, F, h, h_row, 1, second + j * F, block.Output(start) + j, D, std::min<int64_t>(kPanel, D - j), false);
    }
  }
};

struct Unit {
  int64_t expert, first, rows;
};

// y [N, D] of x [N, D], index and weight [N, K], gate_up [E, D, 2F] and down [E, F, D]. apart [P M, D]: room for the
// outputs of M = N K assignments, of up to P parts of the inner width. T: what a number of a matrix is in memory.
template <typename T, ffi::DataType Type>
ffi::Error Routed(ffi::ThreadPool pool, Floats x, Ints index, Floats weight, ffi::Buffer<Type> gate_up,
                  ffi::Buffer<Type> down, ffi::Result<Floats> y, ffi::Result<Floats> apart, float limit) {
  const auto id = index.dimensions(), dd = down.dimensions();
  const int64_t N = id[0], K = id[1], M = N * K, E = dd[0], F = dd[1], D = dd[2];
  const T* gate_ups = reinterpret_cast<const T*>(gate_up.untyped_data());
  const T* downs = reinterpret_cast<const T*>(down.untyped_data());
  float *ys = y->typed_data(), *outputs = apart->typed_data();
  const Sorted sorted(index.typed_data(), M, E);
  const int64_t threads = Threads(pool);
  const bool fits = Network<T>{gate_ups, downs, D, F, F, limit}.Fits();
  const int64_t most = std::clamp(M / (8 * threads), kFewest, fits ? kMost : kBlock);
  std::vector<Unit> units;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t end = sorted.starts[e + 1], size = end - sorted.starts[e], blocks = (size + most - 1) / most;
    // Blocks of an expert are alike, of whole tiles but for the last.
    const int64_t rows = blocks ? ((size + blocks - 1) / blocks + kRows - 1) / kRows * kRows : 0;
    for (int64_t first = sorted.starts[e]; first < end; first += rows)
      units.push_back({e, first, std::min(rows, end - first)});
  }
  const int64_t count = units.size(), room = M ? apart->dimensions()[0] / M : 1;
  const int64_t wanted = std::clamp((2 * threads + count - 1) / std::max<int64_t>(count, 1), int64_t{1}, room);
  const int64_t width = ((F + wanted - 1) / wanted + kLanes - 1) / kLanes * kLanes, parts = (F + width - 1) / width;
  // Of each token, units that are to add to it.
  const std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[N]);
  for (int64_t n = 0; n < N; ++n) {
    const auto first = sorted.place.begin() + n * K;
    left[n] = parts * (K - std::count(first, first + K, -1));
    if (left[n] == 0) std::memset(ys + n * D, 0, D * sizeof(float));
  }
  const auto sum = [&](int64_t n) {
    thread_local std::vector<const float*> own;
    own.clear();
    for (int64_t k = 0; k < K; ++k)
      for (int64_t p = 0; p < parts && sorted.place[n * K + k] >= 0; ++p)
        own.push_back(outputs + (p * M + sorted.place[n * K + k]) * D);
    // Side by side: one after the other, they would be waited for one after the other.
    int64_t j = 0;
    for (; j + kLanes <= D; j += kLanes) {
      Vector all = {};
      for (const float* output : own) all += Loaded(output + j);
      *(Vector*)(ys + n * D + j) = all;
    }
    for (; j < D; ++j) {
      ys[n * D + j] = 0;
      for (const float* output : own) ys[n * D + j] += output[j];
    }
  };
  ForAll(pool, count * parts, [&](int64_t i) {
    const Unit& u = units[i / parts];
    const int64_t part = i % parts, start = part * width;
    const Block own{x.typed_data(), weight.typed_data(), outputs + part * M * D, sorted.order.data(), K, D, u.first, u.rows};
    const T *gate = gate_ups + u.expert * D * 2 * F + start, *down_part = downs + (u.expert * F + start) * D;
    const Network<T> network{gate, down_part, D, F, std::min(width, F - start), limit};
    if (fits && parts == 1 && u.rows > kRows)
      network.ApplyPacked(own);
    else
      network.Apply(own);
    for (int64_t r = 0; r < u.rows; ++r) {
      const int64_t token = sorted.order[u.first + r] / K;
      if (--left[token] == 0) sum(token);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#define ROUTED_OF(NAME, TYPE, FFI_TYPE)                             \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, (Routed<TYPE, FFI_TYPE>),     \
                                ffi::Ffi::Bind()                    \
                                    .Ctx<ffi::ThreadPool>()         \
                                    .Arg<Floats>()                  \
                                    .Arg<Ints>()                    \
                                    .Arg<Floats>()                  \
                                    .Arg<ffi::Buffer<FFI_TYPE>>()   \
                                    .Arg<ffi::Buffer<FFI_TYPE>>()   \
                                    .Ret<Floats>()                  \
                                    .Ret<Floats>()                  \
                                    .Attr<float>("limit"))

ROUTED_OF(RoutedFloat32, float, ffi::F32);
ROUTED_OF(RoutedBfloat16, Bfloat16, ffi::BF16);
ROUTED_OF(RoutedBits, Bfloat16, ffi::U16);
