// Attention over a cache on a CPU, forward only. See native.py.
//
// The queries of some tokens, with all heads that share keys, go over the keys tile by tile with a running softmax: what
// they scored is in a core's cache until it is summed up. Tiles that none of these tokens sees cost a look at their
// positions. Keys and values of float32 or bfloat16, all arithmetic float32.

#include <cmath>
#include <limits>

#include "native_tiles.h"

namespace {

constexpr int64_t kTogether = 8 * kRows;  // queries that go over the keys together, unless more heads share these
constexpr int64_t kKeys = 64;             // of a tile
constexpr float kHidden = -std::numeric_limits<float>::infinity();
static_assert(kKeys % kPanel == 0);

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

inline float Most(Vector x) {
  float most[kLanes];
  *(Vector*)most = x;
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) most[i] = std::max(most[i], most[half + i]);
  return most[0];
}

inline float Sum(Vector x) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

// Keys [B, S, G, K] and values [B, S, G, V], whose rows are so many numbers apart.
template <typename Number>
struct Kept {
  const Number *keys, *values;
  int64_t S, G, K, V, values_apart;
};

// Which tokens see which keys: those of their own segment, unless that is 0, at their own and earlier positions.
struct Places {
  const int32_t *position, *segment, *key_position, *key_segment;
};

// o [B, T, N, V] of q [B, T, N, K].
template <typename Number>
ffi::Error Attend(ffi::ThreadPool& pool, const Floats& q, const Kept<Number>& kept, const Places& places, Floats& o,
                  float scale) {
  const auto qd = q.dimensions();
  const int64_t B = qd[0], T = qd[1], N = qd[2], K = kept.K, S = kept.S, G = kept.G, V = kept.V, J = N / G;
  const int64_t panels = (V + kPanel - 1) / kPanel, wide = panels * kPanel;
  const int64_t some = std::max<int64_t>(1, kTogether / J), blocks = (T + some - 1) / some;
  ForAll(pool, B * G * blocks, [&](int64_t unit) {
    // Blocks of one row and group are taken one after the other: they read the same keys.
    const int64_t b = unit / (G * blocks), g = unit / blocks % G, first = unit % blocks * some;
    const int64_t tokens = std::min(some, T - first), rows = tokens * J;
    thread_local std::vector<float> space;
    thread_local std::vector<int32_t> seen;
    space.assign(rows * (K + kKeys + wide + 1 + kLanes) + kKeys * (K + wide), 0.0f);
    seen.resize(tokens * kKeys);
    float* queries = space.data();
    float* scores = queries + rows * K;
    float* sums = scores + rows * kKeys;
    float* top = sums + rows * wide;
    float* total = top + rows;
    float* packed_keys = total + rows * kLanes;
    float* packed_values = packed_keys + kKeys * K;
    std::fill(top, top + rows, kHidden);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* from = q.typed_data() + ((b * T + first + t) * N + g * J) * K;
      for (int64_t i = 0; i < J * K; ++i) queries[t * J * K + i] = from[i] * scale;
    }
    for (int64_t start = 0; start < S; start += kKeys) {
      const int64_t count = std::min(kKeys, S - start);
      const int32_t* at = places.key_position + b * S + start;
      const int32_t* of = places.key_segment + b * S + start;
      int32_t any = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t token = b * T + first + t;
        const int32_t until = places.position[token], own = places.segment[token];
        int32_t* see = seen.data() + t * kKeys;
        for (int64_t j = 0; j < count; ++j) any |= see[j] = -int32_t(own != 0 && of[j] == own && at[j] <= until);
        std::fill(see + count, see + kKeys, 0);
      }
      if (!any) continue;
      for (int64_t j = 0; j < count; j += kPanel) {
        const Matrix<Number> turned{kept.keys + ((b * S + start + j) * G + g) * K, 1, G * K};
        Pack(turned, K, std::min<int64_t>(kPanel, count - j), packed_keys + j * K);
        Times(rows, K, queries, K, 1, packed_keys + j * K, scores + j, kKeys, false);
      }
      for (int64_t r = 0; r < rows; ++r) {
        float* score = scores + r * kKeys;
        const int32_t* see = seen.data() + r / J * kKeys;
        Vector highest = Vector{} + top[r];
        for (int64_t j = 0; j < kKeys; j += kLanes) {
          const Vector x = *(const Signs*)(see + j) ? Loaded(score + j) : Vector{} + kHidden;
          *(Vector*)(score + j) = x;
          highest = x > highest ? x : highest;
        }
        const float most = Most(highest), from = most == kHidden ? 0 : most;
        Vector sum = Loaded(total + r * kLanes);
        if (most > top[r]) {
          const float before = std::exp(top[r] - from);
          sum *= before;
          for (int64_t j = 0; j < wide; j += kLanes) *(Vector*)(sums + r * wide + j) *= before;
          top[r] = most;
        }
        for (int64_t j = 0; j < kKeys; j += kLanes) {
          const Vector p = Exp(Loaded(score + j) - from);
          *(Vector*)(score + j) = p;
          sum += p;
        }
        *(Vector*)(total + r * kLanes) = sum;
      }
      for (int64_t p = 0; p < panels; ++p) {
        const Matrix<Number> part{kept.values + ((b * S + start) * G + g) * kept.values_apart + p * kPanel,
                                  G * kept.values_apart, 1};
        Pack(part, count, std::min<int64_t>(kPanel, V - p * kPanel), packed_values);
        Times(rows, count, scores, kKeys, 1, packed_values, sums + p * kPanel, wide, true);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* to = o.typed_data() + ((b * T + first + r / J) * N + g * J + r % J) * V;
      const float sum = Sum(Loaded(total + r * kLanes)), divisor = sum > 0 ? sum : 1;
      for (int64_t j = 0; j < V; ++j) to[j] = sums[r * wide + j] / divisor;
    }
  });
  return ffi::Error::Success();
}

template <typename Number, ffi::DataType Type>
ffi::Error Whole(ffi::ThreadPool pool, Floats q, ffi::Buffer<Type> k, ffi::Buffer<Type> v, Ints position, Ints segment,
                 Ints key_position, Ints key_segment, ffi::Result<Floats> o, float scale) {
  const auto kd = k.dimensions();
  const int64_t V = v.dimensions()[3];
  const Kept<Number> kept{reinterpret_cast<const Number*>(k.untyped_data()),
                          reinterpret_cast<const Number*>(v.untyped_data()), kd[1], kd[2], kd[3], V, V};
  const Places places{position.typed_data(), segment.typed_data(), key_position.typed_data(), key_segment.typed_data()};
  return Attend(pool, q, kept, places, *o, scale);
}

// Over a layer of held [L, B, S, K], keys that all heads share and whose first numbers are the values.
template <typename Number, ffi::DataType Type>
ffi::Error Latents(ffi::ThreadPool pool, Floats q, ffi::Buffer<Type> held, Ints layer, Ints position, Ints segment,
                   Ints key_position, Ints key_segment, ffi::Result<Floats> o, float scale) {
  const auto hd = held.dimensions();
  const Number* keys = reinterpret_cast<const Number*>(held.untyped_data()) + *layer.typed_data() * hd[1] * hd[2] * hd[3];
  const Kept<Number> kept{keys, keys, hd[2], 1, hd[3], o->dimensions()[3], hd[3]};
  const Places places{position.typed_data(), segment.typed_data(), key_position.typed_data(), key_segment.typed_data()};
  return Attend(pool, q, kept, places, *o, scale);
}

}  // namespace

#define ATTEND_OF(NAME, FUNCTION, SECOND, TYPE, FFI_TYPE)            \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, (FUNCTION<TYPE, FFI_TYPE>),    \
                                ffi::Ffi::Bind()                     \
                                    .Ctx<ffi::ThreadPool>()          \
                                    .Arg<Floats>()                   \
                                    .Arg<ffi::Buffer<FFI_TYPE>>()    \
                                    .Arg<SECOND>()                   \
                                    .Arg<Ints>()                     \
                                    .Arg<Ints>()                     \
                                    .Arg<Ints>()                     \
                                    .Arg<Ints>()                     \
                                    .Ret<Floats>()                   \
                                    .Attr<float>("scale"))

ATTEND_OF(AttendFloat32, Whole, ffi::Buffer<ffi::F32>, float, ffi::F32);
ATTEND_OF(AttendBfloat16, Whole, ffi::Buffer<ffi::BF16>, Bfloat16, ffi::BF16);
ATTEND_OF(AttendLatentsFloat32, Latents, Ints, float, ffi::F32);
ATTEND_OF(AttendLatentsBfloat16, Latents, Ints, Bfloat16, ffi::BF16);
