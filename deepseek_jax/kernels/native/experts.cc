// The routed experts' networks on a CPU in one call.
//
// A unit of work takes some rows of one expert from the gathered inputs through both products; what lies between is in a
// core's cache, and so is the expert itself if it is small. Where there are fewer units than threads, an expert's inner
// width is parted too.

#include "experts.h"

using namespace native;

namespace {

// to = weight silu(gate) up, with both factors cut off at the limit.
inline void Activate(int64_t count, const float* gate, const float* up, float limit, float weight, float* to) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vector g = Under(Some(gate + j, count - j), limit), u = Between(Some(up + j, count - j), limit);
    Store(g * Sigmoid(g) * u * weight, to + j, count - j);
  }
}

// Sorted rows of one expert, and where what is computed of them goes: outputs by place, and, unless it is null, what the
// first product made of them, [gate | up] by place.
struct Block {
  Taken x;
  const float* weights;
  float *outputs, *kept;
  int64_t first, rows;

  float* Output(int64_t r) const { return outputs + (first + r) * x.D; }
  float Weight(int64_t r) const { return weights[x.order[first + r]]; }
};

// An expert, or a part of its inner width: gate [D, width], up F numbers behind it, in rows of 2F; down [width, D], the
// part's first number being number `start` of the inner width.
template <typename T>
struct Network {
  const T *gate, *down;
  int64_t D, F, start, width;
  float limit;

  // Numbers that its matrices take when they are packed.
  int64_t PackedRoom() const { return PanelsRoom(D, 2 * F) + PanelsRoom(F, D); }

  // All rows, at most kBlock, through one product and then through the other.
  void Apply(const Block& block) const {
    // Rows are no power of two apart: those would share lines of the first cache.
    const int64_t x_row = D + kLanes, a_row = width + kLanes, h_row = block.kept ? 2 * F : 2 * width + kLanes;
    thread_local std::vector<float> space;
    float* x = Room(space, block.rows * (x_row + a_row + (block.kept ? 0 : h_row)));
    float* a = x + block.rows * x_row;
    float* h = block.kept ? block.kept + block.first * h_row + start : a + block.rows * a_row;
    const int64_t up = block.kept ? F : width;
    block.x.Gather(block.first, block.rows, 0, D, x_row, x);
    // Gate and up are one matrix unless only a part of each is needed.
    const int64_t halves = width < F ? 2 : 1, columns = 2 * width / halves;
    for (int64_t half = 0; half < halves; ++half)
      Multiply<T>({x, x_row, 1}, {gate + half * F, 2 * F, 1}, h + half * up, h_row, block.rows, columns, D);
    for (int64_t r = 0; r < block.rows; ++r)
      Activate(width, h + r * h_row, h + r * h_row + up, limit, block.Weight(r), a + r * a_row);
    Multiply<T>({a, a_row, 1}, {down, D, 1}, block.Output(0), D, block.rows, D, width);
  }

  // As `Apply`, of a whole expert that fits: it is packed, and a tile's rows go through both products in the first cache.
  void ApplyPacked(const Block& block) const {
    const int64_t x_row = D + kLanes, a_row = F + kLanes, h_row = block.kept ? 2 * F : 2 * F + kLanes;
    thread_local std::vector<float> space;
    float* first = Room(space, PackedRoom() + kTall * (x_row + a_row + h_row));
    float *second = first + PanelsRoom(D, 2 * F), *x = first + PackedRoom(), *a = x + kTall * x_row, *own = a + kTall * a_row;
    const Matrix<T> gate_up{gate, 2 * F, 1}, out{down, D, 1};
    Fetch(gate_up, D, 2 * F);
    PackWhole(gate_up, D, 2 * F, first);
    Fetch(out, F, D);
    PackWhole(out, F, D, second);
    for (int64_t r = 0; r < block.rows; r += kTall) {
      const int64_t some = std::min<int64_t>(kTall, block.rows - r);
      float* h = block.kept ? block.kept + (block.first + r) * h_row : own;
      block.x.Gather(block.first + r, some, 0, D, x_row, x);
      ProductOfWhole<T>({x, x_row, 1}, first, h, h_row, some, 2 * F, D);
      for (int64_t i = 0; i < some; ++i)
        Activate(F, h + i * h_row, h + i * h_row + F, limit, block.Weight(r + i), a + i * a_row);
      ProductOfWhole<T>({a, a_row, 1}, second, block.Output(r), D, some, D, F);
    }
  }
};

// y [N, D] of x [N, D], index and weight [N, K], gate_up [E, D, 2F] and down [E, F, D]. apart [P M, D]: room for the
// outputs of M = N K assignments, of up to P parts of the inner width. h: [gate | up] [M, 2F] by place, zero behind the
// last, or of no rows where nobody needs it. T: what a number of a matrix is in memory.
template <typename T, ffi::DataType Type>
ffi::Error Routed(ffi::ThreadPool pool, Floats x, Ints index, Floats weight, ffi::Buffer<Type> gate_up,
                  ffi::Buffer<Type> down, ffi::Result<Floats> y, ffi::Result<Floats> h, ffi::Result<Floats> apart,
                  float limit) {
  const auto id = index.dimensions(), dd = down.dimensions();
  const int64_t N = id[0], K = id[1], M = N * K, E = dd[0], F = dd[1], D = dd[2];
  const T* gate_ups = reinterpret_cast<const T*>(gate_up.untyped_data());
  const T* downs = reinterpret_cast<const T*>(down.untyped_data());
  float *outputs = apart->typed_data(), *kept = h->element_count() ? h->typed_data() : nullptr;
  const Sorted sorted(index.typed_data(), M, E);
  const int64_t threads = Threads(pool), places = sorted.order.size();
  if (kept) std::memset(kept + places * 2 * F, 0, (M - places) * 2 * F * sizeof(float));
  const bool fits = Fits(PanelsRoom(D, 2 * F) + PanelsRoom(F, D));
  const int64_t most = std::clamp(M / (8 * threads), kFewest, fits ? kMost : kBlock);
  std::vector<Unit> units;
  for (int64_t e = 0; e < E; ++e)
    for (const Unit& unit : sorted.Units(e, most)) units.push_back(unit);
  const int64_t count = units.size(), room = M ? apart->dimensions()[0] / M : 1;
  const int64_t wanted = std::clamp((2 * threads + count - 1) / std::max<int64_t>(count, 1), int64_t{1}, room);
  const int64_t width = ((F + wanted - 1) / wanted + kLanes - 1) / kLanes * kLanes, parts = (F + width - 1) / width;
  const Sums sums(sorted, outputs, N, K, D, parts, y->typed_data());
  const Taken inputs{x.typed_data(), sorted.order.data(), K, D, places};
  ForAll(pool, count * parts, [&](int64_t i) {
    const Unit& u = units[i / parts];
    const int64_t part = i % parts, start = part * width;
    const Block block{inputs, weight.typed_data(), outputs + part * M * D, kept, u.first, u.rows};
    const T *gate = gate_ups + u.expert * D * 2 * F + start, *down_part = downs + (u.expert * F + start) * D;
    const Network<T> network{gate, down_part, D, F, start, std::min(width, F - start), limit};
    if (fits && parts == 1 && u.rows > kRows)
      network.ApplyPacked(block);
    else
      network.Apply(block);
    sums.Add(u);
  });
  return ffi::Error::Success();
}

}  // namespace

#define RESULTS .Ret<Floats>().Ret<Floats>().Ret<Floats>()
EXPERTS_OF(RoutedFloat32, Routed, float, ffi::F32, RESULTS);
EXPERTS_OF(RoutedBfloat16, Routed, Bfloat16, ffi::BF16, RESULTS);
EXPERTS_OF(RoutedBits, Routed, Bfloat16, ffi::U16, RESULTS);
