// What the passes of routed experts on a CPU share: assignments in order of expert, the blocks of rows that threads take,
// SwiGLU, the sums of a token's outputs, and how XLA calls them.

#pragma once

#include <numeric>

#include "calls.h"
#include "products.h"

namespace native {

constexpr int64_t kLine = 16;           // numbers of a line of memory
constexpr int64_t kFewest = 4 * kRows;  // rows of a unit that are parted no further
constexpr int64_t kMost = 32 * kRows;   // rows of a unit whose expert is packed at once

// Whether matrices that are packed in so many numbers of room are packed at once: a core's own cache holds them.
#ifdef MATRIX_UNITS
inline bool Fits(int64_t room) { return room <= 3 << 16; }
#else
inline bool Fits(int64_t room) { return room <= 1 << 17; }
#endif

struct Unit {
  int64_t expert, first, rows;
};

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

  // An expert's rows in blocks that are alike, of at most so many, and of whole tiles but for the last.
  std::vector<Unit> Units(int64_t e, int64_t most) const {
    std::vector<Unit> units;
    const int64_t end = starts[e + 1], size = end - starts[e], blocks = (size + most - 1) / most;
    const int64_t rows = blocks ? Whole((size + blocks - 1) / blocks, kTall) : 0;
    for (int64_t first = starts[e]; first < end; first += rows) units.push_back({e, first, std::min(rows, end - first)});
    return units;
  }
};

// Rows of some tokens [N, D] as assignments take them: place r is of token order[r] / K.
struct Taken {
  const float* from;
  const int64_t* order;
  int64_t K, D, places;

  const float* Row(int64_t r) const { return from + order[std::min(r, places - 1)] / K * D; }

  // to [some, columns], whose rows are so many numbers apart: the columns from number `start` on, of places from r on.
  void Gather(int64_t r, int64_t some, int64_t start, int64_t columns, int64_t apart, float* to) const {
    for (const int64_t end = r + some; r < end; ++r, to += apart) {
      // Nothing but the order foretells where the next ones lie.
      for (int64_t j = start; j < start + columns; j += kLine) __builtin_prefetch(Row(r + 2) + j);
      std::memcpy(to, Row(r) + start, columns * sizeof(float));
    }
  }
};

inline Vector Sigmoid(Vector x) {
  const Vector small = Exp(x > 0.0f ? -x : x);
  return (x > 0.0f ? Vector{} + 1.0f : small) / (1.0f + small);
}

inline Vector Under(Vector x, float limit) { return x > limit ? Vector{} + limit : x; }
inline Vector Between(Vector x, float limit) { return x < -limit ? Vector{} - limit : Under(x, limit); }

// The outputs of M = N K assignments by place, [parts M, D], and the sums [N, D] of each token's in its own order, by
// whoever computes the last of them: which thread takes what changes no bit.
struct Sums {
  const Sorted& sorted;
  const float* outputs;
  int64_t N, K, D, parts;
  float* sums;
  std::unique_ptr<std::atomic<int64_t>[]> left;  // of each token, outputs that are not there yet

  Sums(const Sorted& sorted, const float* outputs, int64_t N, int64_t K, int64_t D, int64_t parts, float* sums)
      : sorted(sorted), outputs(outputs), N(N), K(K), D(D), parts(parts), sums(sums), left(new std::atomic<int64_t>[N]) {
    for (int64_t n = 0; n < N; ++n) {
      const auto first = sorted.place.begin() + n * K;
      left[n] = parts * (K - std::count(first, first + K, -1));
      if (left[n] == 0) std::memset(sums + n * D, 0, D * sizeof(float));
    }
  }

  // A unit's outputs are there.
  void Add(const Unit& u) const {
    for (int64_t r = u.first; r < u.first + u.rows; ++r)
      if (const int64_t token = sorted.order[r] / K; --left[token] == 0) Sum(token);
  }

  void Sum(int64_t n) const {
    thread_local std::vector<const float*> own;
    own.clear();
    for (int64_t k = 0; k < K; ++k)
      for (int64_t p = 0; p < parts && sorted.place[n * K + k] >= 0; ++p)
        own.push_back(outputs + (p * N * K + sorted.place[n * K + k]) * D);
    // Side by side: one after the other, they would be waited for one after the other.
    int64_t j = 0;
    for (; j + kLanes <= D; j += kLanes) {
      Vector all = {};
      for (const float* output : own) all += Loaded(output + j);
      *(Vector*)(sums + n * D + j) = all;
    }
    for (; j < D; ++j) {
      sums[n * D + j] = 0;
      for (const float* output : own) sums[n * D + j] += output[j];
    }
  }
};

}  // namespace native

// x, index, weight, gate_up and down come first.
#define EXPERTS_OF(NAME, FUNCTION, TYPE, FFI_TYPE, MORE)          \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, (FUNCTION<TYPE, FFI_TYPE>), \
                                ffi::Ffi::Bind()                  \
                                    .Ctx<ffi::ThreadPool>()       \
                                    .Arg<Floats>()                \
                                    .Arg<Ints>()                  \
                                    .Arg<Floats>()                \
                                    .Arg<ffi::Buffer<FFI_TYPE>>() \
                                    .Arg<ffi::Buffer<FFI_TYPE>>() MORE.Attr<float>("limit"))
