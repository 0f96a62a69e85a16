// Attention on a CPU.
//
// The queries of some tokens, with all heads that share keys, go over the keys tile by tile with a running softmax: what
// they scored is in a core's cache until it is summed up. Tiles that none of these tokens sees cost a look at their
// positions. Keys and values of float32 or bfloat16, all arithmetic float32.

#include "attention.h"

using namespace native;

namespace {

constexpr int64_t kPacked = 1 << 20;  // numbers that a thread keeps packed
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// The largest number of a vector in all of its lanes: of halves, quarters and so on.
template <int S = kLanes / 2, int... I>
inline Vector Most(Vector x, std::integer_sequence<int, I...> lanes) {
  const Vector other = __builtin_shufflevector(x, x, (I ^ S)...);
  x = x > other ? x : other;
  if constexpr (S > 1)
    return Most<S / 2>(x, lanes);
  else
    return x;
}

inline float Sum(Vector x) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

// Keys [B, S, G, K] and values [B, S, G, V], whose rows are so many numbers apart.
template <typename Number>
struct Kept {
  const Number *keys, *values;
  int64_t S, G, K, V, values_apart;
};

// Tiles of keys and values as a thread has packed them, all of a row and key head or the last one: the next block of
// queries reads the same.
struct Tiles {
  std::vector<float> room;
  std::vector<int64_t> starts;
  int64_t call = 0, group = 0;

  // Where the tile is or is to be, and whether it is to be packed.
  std::pair<float*, bool> At(int64_t start, int64_t numbers) {
    const int64_t slot = start / kKeys % starts.size();
    return {Room(room, 0) + slot * numbers, std::exchange(starts[slot], start) != start};
  }
};

// o [B, T, N, V] of q [B, T, N, K], and the logarithms of the softmax's sums [B, T, N] where these are asked for; 0 for
// queries that see nothing.
template <typename Number>
ffi::Error Attend(ffi::ThreadPool& pool, const Floats& q, const Kept<Number>& kept, const Places& places, Floats& o,
                  float* logs, float scale) {
  const auto qd = q.dimensions();
  const int64_t B = qd[0], T = qd[1], N = qd[2], K = kept.K, S = kept.S, G = kept.G, V = kept.V, J = N / G;
  const int64_t wide = (V + kPanel - 1) / kPanel * kPanel;
  const int64_t some = std::max<int64_t>(1, kTogether / J), blocks = (T + some - 1) / some;
  const int64_t numbers = kKeys * (K + wide), all = (S + kKeys - 1) / kKeys;
  const int64_t slots = blocks > 1 && all * numbers <= kPacked ? all : 1;
  static std::atomic<int64_t> calls{0};
  const int64_t call = ++calls;
  ForAll(pool, B * G * blocks, [&](int64_t unit) {
    // Blocks of one row and group are taken one after the other: they read the same keys.
    const int64_t b = unit / (G * blocks), g = unit / blocks % G, first = unit % blocks * some;
    const int64_t tokens = std::min(some, T - first), rows = tokens * J;
    thread_local std::vector<float> space;
    thread_local Seen seen;
    thread_local Tiles tiles;
    seen.Of(tokens);
    if (std::exchange(tiles.call, call) != call | std::exchange(tiles.group, b * G + g) != b * G + g) {
      Room(tiles.room, slots * numbers);
      tiles.starts.assign(slots, -1);
    }
    float* scores = Room(space, rows * (kKeys + wide + kLanes + K + 1));
    float *sums = scores + rows * kKeys, *total = sums + rows * wide, *queries = total + rows * kLanes;
    float* top = queries + rows * K;
    std::fill(sums, queries, 0.0f);
    std::fill(top, top + rows, kHidden);
    Gather(q.typed_data(), b * T + first, rows, N, g, J, K, scale, queries);
    for (int64_t start = 0; start < S; start += kKeys) {
      const int64_t count = std::min(kKeys, S - start);
      if (!places.See(b, first, tokens, start, seen)) continue;
      const auto [keys, fresh] = tiles.At(start, numbers);
      float* values = keys + kKeys * K;
      if (fresh) {
        const int64_t first_key = (b * S + start) * G + g;
        PackAll(Matrix<Number>{kept.keys + first_key * K, 1, G * K}, K, count, keys);
        PackAll(Matrix<Number>{kept.values + first_key * kept.values_apart, G * kept.values_apart, 1}, count, V, values);
      }
      for (int64_t j = 0; j < count; j += kPanel) Times(rows, K, queries, K, 1, keys + j * K, scores + j, kKeys, false);
      for (int64_t r = 0; r < rows; ++r) {
        float* score = scores + r * kKeys;
        const int32_t* see = seen.Row(r, J);
        Vector highest = Vector{} + top[r];
        for (int64_t j = 0; j < kKeys; j += kLanes) {
          const Vector x = *(const Signs*)(see + j) ? Loaded(score + j) : Vector{} + kHidden;
          *(Vector*)(score + j) = x;
          highest = x > highest ? x : highest;
        }
        const float most = Most(highest, std::make_integer_sequence<int, kLanes>())[0], from = most == kHidden ? 0 : most;
        Vector sum = Loaded(total + r * kLanes);
        if (most > top[r]) {
          const Vector before = Exp(Vector{} + (top[r] - from));
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
      for (int64_t j = 0; j < wide; j += kPanel)
        Times(rows, count, scores, kKeys, 1, values + j * count, sums + j, wide, true);
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

#define LOGS .Ret<Floats>()
ATTEND_OF(AttendFloat32, Whole, ffi::Buffer<ffi::F32>, float, ffi::F32, LOGS);
ATTEND_OF(AttendBfloat16, Whole, ffi::Buffer<ffi::BF16>, Bfloat16, ffi::BF16, LOGS);
ATTEND_OF(AttendLatentsFloat32, Latents, Ints, float, ffi::F32, );
ATTEND_OF(AttendLatentsBfloat16, Latents, Ints, Bfloat16, ffi::BF16, );
