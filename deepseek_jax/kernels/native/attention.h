// What attention's passes on a CPU share: which tokens see which keys, and how XLA calls them.

#pragma once

#include <cmath>
#include <limits>

#include "calls.h"
#include "tiles.h"

namespace native {

constexpr int64_t kTogether = 8 * kRows;  // queries that go over the keys together, unless more heads share these
constexpr int64_t kKeys = 64;             // of a tile
static_assert(kKeys % kPanel == 0);

// The least and the largest of some numbers, at least one.
struct Range {
  int32_t low, high;
  Range(const int32_t* from, int64_t count) : low(from[0]), high(from[0]) {
    for (int64_t i = 1; i < count; ++i) low = std::min(low, from[i]), high = std::max(high, from[i]);
  }
};

// -1 for what is seen, [tokens, kKeys], as a thread has them.
struct Seen {
  std::vector<int32_t> marks;
  bool all = false;

  void Of(int64_t tokens) {
    marks.resize(tokens * kKeys);
    all = false;
  }
  // Of a row of scores, where J rows are a token's.
  const int32_t* Row(int64_t r, int64_t J) const { return marks.data() + r / J * kKeys; }
};

// Which tokens see which keys: those of their own segment, unless that is 0, at their own and earlier positions.
struct Places {
  const int32_t *position, *segment, *key_position, *key_segment;
  int64_t T, S;

  Places(const Ints& p, const Ints& s, const Ints& kp, const Ints& ks)
      : position(p.typed_data()), segment(s.typed_data()), key_position(kp.typed_data()), key_segment(ks.typed_data()),
        T(p.dimensions()[1]), S(kp.dimensions()[1]) {}

  // Marks in `seen` which of a tile's keys, from `start` on, each of some tokens sees, from `first` of row b on. Whether any
  // sees any.
  bool See(int64_t b, int64_t first, int64_t tokens, int64_t start, Seen& seen) const {
    const int64_t count = std::min(kKeys, S - start);
    const int32_t *at = key_position + b * S + start, *of = key_segment + b * S + start;
    const int32_t *until = position + b * T + first, *own = segment + b * T + first;
    const Range keys(at, count), of_keys(of, count), tokens_at(until, tokens), of_tokens(own, tokens);
    if (keys.low > tokens_at.high || of_keys.low > of_tokens.high || of_keys.high < of_tokens.low) return false;
    // The same one, since these overlap.
    const bool one = of_keys.low == of_keys.high && of_tokens.low == of_tokens.high;
    if (one && own[0] != 0 && count == kKeys && keys.high <= tokens_at.low) {
      // Most tiles: the last one may have been such a one as well.
      if (!std::exchange(seen.all, true)) std::fill(seen.marks.begin(), seen.marks.end(), -1);
      return true;
    }
    seen.all = false;
    int32_t any = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const int32_t last = until[t], mine = own[t];
      int32_t* see = seen.marks.data() + t * kKeys;
      for (int64_t j = 0; j < count; ++j) any |= see[j] = -int32_t(mine != 0 && of[j] == mine && at[j] <= last);
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

}  // namespace native

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
