// The gradients of attention on a CPU.
//
// As the forward pass goes, block of queries by tile of keys; the probabilities are computed again from the logarithms
// of the softmax's sums.

#include "attention.h"

using namespace native;

namespace {

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
    thread_local Seen seen;
    seen.Of(some);
    float* next = Room(space, room * (2 * wide_k + wide_v + K + V) + most * (K + V + 2 * wide_k + wide_v + 2 * kKeys + 1));
    const auto take = [&](int64_t numbers) { return std::exchange(next, next + numbers); };
    float *turned_keys = take(room * K), *turned_values = take(room * V), *keys = take(room * wide_k);
    float *key_sums = take(room * wide_k), *value_sums = take(room * wide_v);
    std::fill(key_sums, next, 0.0f);
    float *queries = take(most * K), *query_panels = take(most * wide_k), *query_sums = take(most * wide_k);
    float *given = take(most * V), *given_panels = take(most * wide_v);
    float *chances = take(most * kKeys), *score_gradients = take(most * kKeys), *means = take(most);
    const Number* own_keys = reinterpret_cast<const Number*>(k.untyped_data()) + (b * S * G + g) * K;
    const Number* own_values = reinterpret_cast<const Number*>(v.untyped_data()) + (b * S * G + g) * V;
    PackAll(Matrix<Number>{own_keys, 1, G * K}, K, S, turned_keys);
    PackAll(Matrix<Number>{own_values, 1, G * V}, V, S, turned_values);
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
        if (!places.See(b, first, tokens, start, seen)) continue;
        for (int64_t j = 0; j < count; j += kPanel) {
          Times(rows, K, queries, K, 1, turned_keys + (start + j) * K, chances + j, kKeys, false);
          Times(rows, V, given, V, 1, turned_values + (start + j) * V, score_gradients + j, kKeys, false);
        }
        for (int64_t r = 0; r < rows; ++r) {
          const float log = logs.typed_data()[head(r)], mean = means[r];
          for (int64_t j = 0; j < kKeys; j += kLanes) {
            float *p = chances + r * kKeys + j, *ds = score_gradients + r * kKeys + j;
            const auto see = *(const Signs*)(seen.Row(r, J) + j);
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

}  // namespace

#define GRADIENTS .Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Floats>().Ret<Floats>()
ATTEND_OF(AttendGradientsFloat32, Gradients, ffi::Buffer<ffi::F32>, float, ffi::F32, GRADIENTS);
ATTEND_OF(AttendGradientsBfloat16, Gradients, ffi::Buffer<ffi::BF16>, Bfloat16, ffi::BF16, GRADIENTS);
