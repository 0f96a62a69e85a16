// Attention on a CPU. See native.py.
//
// The queries of some tokens, with all heads that share keys, go over the keys tile by tile with a running softmax: what
// they scored is in a core's cache until it is summed up. Tiles that none of these tokens sees cost a look at their
// positions. Gradients are taken the same way, from the logarithms of the softmax's sums. Keys and values of float32 or
// bfloat16, all arithmetic float32.

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
  int64_t T, S;

  Places(const Ints& p, const Ints& s, const Ints& kp, const Ints& ks)
      : position(p.typed_data()), segment(s.typed_data()), key_position(kp.typed_data()), key_segment(ks.typed_data()),
        T(p.dimensions()[1]), S(kp.dimensions()[1]) {}

  // seen [tokens, kKeys]: -1 where a token, from `first` of row b on, sees a key, from `start` on. Whether any sees any.
  bool See(int64_t b, int64_t first, int64_t tokens, int64_t start, int32_t* seen) const {
    const int64_t count = std::min(kKeys, S - start);
    const int32_t *at = key_position + b * S + start, *of = key_segment + b * S + start;
    int32_t any = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const int32_t until = position[b * T + first + t], own = segment[b * T + first + t];
      int32_t* see = seen + t * kKeys;
      for (int64_t j = 0; j < count; ++j) any |= see[j] = -int32_t(own != 0 && of[j] == own && at[j] <= until);
      std::fill(see + count, see + kKeys, 0);
    }
    return any;
  }
};

// to [rows, width], times scale, from an array [B, T, N, width]: tokens from number `token` on, each with the heads of g.
inline void Gather(const float* from, int64_t token, int64_t rows, int64_t N, int64_t g, int64_t J, int64_t width,
                   float scale, float* to) {
  for (int64_t t = 0; t < rows / J; ++t)
    for (int64_t i = 0; i < J * width; ++i) to[t * J * width + i] = from[((token + t) * N + g * J) * width + i] * scale;
}

// o [B, T, N, V] of q [B, T, N, K], and the logarithms of the softmax's sums [B, T, N] where these are asked for; 0 for
// queries that see nothing.
template <typename Number>
ffi::Error Attend(ffi::ThreadPool& pool, const Floats& q, const Kept<Number>& kept, const Places& places, Floats& o,
                  float* logs, float scale) {
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
    Gather(q.typed_data(), b * T + first, rows, N, g, J, K, scale, queries);
    for (int64_t start = 0; start < S; start += kKeys) {
      const int64_t count = std::min(kKeys, S - start);
      if (!places.See(b, first, tokens, start, seen.data())) continue;
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
      const int64_t head = (b * T + first + r / J) * N + g * J + r % J;
      const float sum = Sum(Loaded(total + r * kLanes)), divisor = sum > 0 ? sum : 1;
      for (int64_t j = 0; j < V; ++j) o.typed_data()[head * V + j] = sums[r * wide + j] / divisor;
      if (logs) logs[head] = sum > 0 ? top[r] + std::log(sum) : 0;
    }
  });
  return ffi::Error::Success();
}

// dq [B, T, N, K], dk [B, S, G, K] and dv [B, S, G, V] of dO [B, T, N, V]: of a row and a key head each on one thread,
// which adds to what is its own.
template <typename Number, ffi::DataType Type>
ffi::Error Gradients(ffi::ThreadPool pool, Floats q, ffi::Buffer<Type> k, ffi::Buffer<Type> v, Ints position,
                     Ints segment, Ints key_position, Ints key_segment, Floats o, Floats logs, Floats d_o,
                     ffi::Result<Floats> dq, ffi::Result<Floats> dk, ffi::Result<Floats> dv, float scale) {
  const auto qd = q.dimensions(), kd = k.dimensions();
  const int64_t B = qd[0], T = qd[1], N = qd[2], K = qd[3], S = kd[1], G = kd[2], V = v.dimensions()[3], J = N / G;
  const int64_t wide_k = (K + kPanel - 1) / kPanel * kPanel, wide_v = (V + kPanel - 1) / kPanel * kPanel;
  const int64_t some = std::max<int64_t>(1, kTogether / J), most = std::min(some, T) * J;
  const int64_t room = (S + kKeys - 1) / kKeys * kKeys;
  const Places places(position, segment, key_position, key_segment);
  ForAll(pool, B * G, [&](int64_t unit) {
    const int64_t b = unit / G, g = unit % G;
    thread_local std::vector<float> space;
    thread_local std::vector<int32_t> seen;
    space.assign(room * (2 * wide_k + wide_v + K + V) + most * (K + V + 2 * wide_k + wide_v + 2 * kKeys + 1), 0.0f);
    seen.resize(some * kKeys);
    float* next = space.data();
    const auto take = [&](int64_t numbers) { return std::exchange(next, next + numbers); };
    float *turned_keys = take(room * K), *turned_values = take(room * V), *keys = take(room * wide_k);
    float *key_sums = take(room * wide_k), *value_sums = take(room * wide_v);
    float *queries = take(most * K), *query_panels = take(most * wide_k), *query_sums = take(most * wide_k);
    float *given = take(most * V), *given_panels = take(most * wide_v);
    float *chances = take(most * kKeys), *score_gradients = take(most * kKeys), *means = take(most);
    const Number* own_keys = reinterpret_cast<const Number*>(k.untyped_data()) + (b * S * G + g) * K;
    const Number* own_values = reinterpret_cast<const Number*>(v.untyped_data()) + (b * S * G + g) * V;
    for (int64_t j = 0; j < S; j += kPanel) {
      const int64_t count = std::min<int64_t>(kPanel, S - j);
      Pack(Matrix<Number>{own_keys + j * G * K, 1, G * K}, K, count, turned_keys + j * K);
      Pack(Matrix<Number>{own_values + j * G * V, 1, G * V}, V, count, turned_values + j * V);
    }
    for (int64_t start = 0; start < S; start += kKeys)
      PackAll(Matrix<Number>{own_keys + start * G * K, G * K, 1}, std::min(kKeys, S - start), K, keys + start * wide_k);
    for (int64_t first = 0; first < T; first += some) {
      const int64_t tokens = std::min(some, T - first), rows = tokens * J;
      Gather(q.typed_data(), b * T + first, rows, N, g, J, K, scale, queries);
      Gather(d_o.typed_data(), b * T + first, rows, N, g, J, V, 1, given);
      PackAll(Matrix<float>{queries, K, 1}, rows, K, query_panels);
      PackAll(Matrix<float>{given, V, 1}, rows, V, given_panels);
      std::fill(query_sums, query_sums + rows * wide_k, 0.0f);
      const auto head = [&](int64_t r) { return (b * T + first + r / J) * N + g * J + r % J; };
      for (int64_t r = 0; r < rows; ++r) {
        means[r] = 0;
        for (int64_t j = 0; j < V; ++j) means[r] += o.typed_data()[head(r) * V + j] * given[r * V + j];
      }
      for (int64_t start = 0; start < S; start += kKeys) {
        const int64_t count = std::min(kKeys, S - start);
        if (!places.See(b, first, tokens, start, seen.data())) continue;
        for (int64_t j = 0; j < count; j += kPanel) {
          Times(rows, K, queries, K, 1, turned_keys + (start + j) * K, chances + j, kKeys, false);
          Times(rows, V, given, V, 1, turned_values + (start + j) * V, score_gradients + j, kKeys, false);
        }
        for (int64_t r = 0; r < rows; ++r) {
          const float log = logs.typed_data()[head(r)], mean = means[r];
          for (int64_t j = 0; j < kKeys; j += kLanes) {
            float *p = chances + r * kKeys + j, *ds = score_gradients + r * kKeys + j;
            const auto see = *(const Signs*)(seen.data() + r / J * kKeys + j);
            const Vector chance = see ? Exp(Loaded(p) - log) : Vector{};
            *(Vector*)ds = see ? chance * (Loaded(ds) - mean) : Vector{};
            *(Vector*)p = chance;
          }
        }
        for (int64_t j = 0; j < wide_v; j += kPanel)
          Times(count, rows, chances, 1, kKeys, given_panels + j * rows, value_sums + start * wide_v + j, wide_v, true);
        for (int64_t j = 0; j < wide_k; j += kPanel) {
          Times(count, rows, score_gradients, 1, kKeys, query_panels + j * rows, key_sums + start * wide_k + j, wide_k,
                true);
          Times(rows, count, score_gradients, kKeys, 1, keys + start * wide_k + j * count, query_sums + j, wide_k, true);
        }
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < K; ++j) dq->typed_data()[head(r) * K + j] = query_sums[r * wide_k + j] * scale;
    }
    for (int64_t s = 0; s < S; ++s) {
      const int64_t row = (b * S + s) * G + g;
      std::copy_n(key_sums + s * wide_k, K, dk->typed_data() + row * K);
      std::copy_n(value_sums + s * wide_v, V, dv->typed_data() + row * V);
    }
  });
  return ffi::Error::Success();
}

template <typename Number, ffi::DataType Type>
ffi::Error Whole(ffi::ThreadPool pool, Floats q, ffi::Buffer<Type> k, ffi::Buffer<Type> v, Ints position, Ints segment,
                 Ints key_position, Ints key_segment, ffi::Result<Floats> o, ffi::Result<Floats> logs, float scale) {
  const auto kd = k.dimensions();
  const int64_t V = v.dimensions()[3];
  const Kept<Number> kept{reinterpret_cast<const Number*>(k.untyped_data()),
                          reinterpret_cast<const Number*>(v.untyped_data()), kd[1], kd[2], kd[3], V, V};
  return Attend(pool, q, kept, {position, segment, key_position, key_segment}, *o, logs->typed_data(), scale);
}

// Over a layer of held [L, B, S, K], keys that all heads share and whose first numbers are the values.
template <typename Number, ffi::DataType Type>
ffi::Error Latents(ffi::ThreadPool pool, Floats q, ffi::Buffer<Type> held, Ints layer, Ints position, Ints segment,
                   Ints key_position, Ints key_segment, ffi::Result<Floats> o, float scale) {
  const auto hd = held.dimensions();
  const Number* keys = reinterpret_cast<const Number*>(held.untyped_data()) + *layer.typed_data() * hd[1] * hd[2] * hd[3];
  const Kept<Number> kept{keys, keys, hd[2], 1, hd[3], o->dimensions()[3], hd[3]};
  return Attend(pool, q, kept, {position, segment, key_position, key_segment}, *o, nullptr, scale);
}

}  // namespace

#define ATTEND_OF(NAME, FUNCTION, SECOND, TYPE, FFI_TYPE, MORE)   \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, (FUNCTION<TYPE, FFI_TYPE>), \
                                ffi::Ffi::Bind()                  \
                                    .Ctx<ffi::ThreadPool>()       \
                                    .Arg<Floats>()                \
                                    .Arg<ffi::Buffer<FFI_TYPE>>() \
                                    .Arg<SECOND>()                \
                                    .Arg<Ints>()                  \
                                    .Arg<Ints>()                  \
                                    .Arg<Ints>()                  \
                                    .Arg<Ints>() MORE             \
                                    .Ret<Floats>()                \
                                    .Attr<float>("scale"))

#define LOGS .Ret<Floats>()
#define GRADIENTS .Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Floats>().Ret<Floats>()
ATTEND_OF(AttendFloat32, Whole, ffi::Buffer<ffi::F32>, float, ffi::F32, LOGS);
ATTEND_OF(AttendBfloat16, Whole, ffi::Buffer<ffi::BF16>, Bfloat16, ffi::BF16, LOGS);
ATTEND_OF(AttendGradientsFloat32, Gradients, ffi::Buffer<ffi::F32>, float, ffi::F32, GRADIENTS);
ATTEND_OF(AttendGradientsBfloat16, Gradients, ffi::Buffer<ffi::BF16>, Bfloat16, ffi::BF16, GRADIENTS);
ATTEND_OF(AttendLatentsFloat32, Latents, Ints, float, ffi::F32, );
ATTEND_OF(AttendLatentsBfloat16, Latents, Ints, Bfloat16, ffi::BF16, );
