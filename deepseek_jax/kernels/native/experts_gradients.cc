// The gradients of the routed experts' networks on a CPU in one call.
//
// Of each expert first its rows, some at a time, back to the gradients of the inputs; then, when all of them are there, the
// gradients of its matrices, some rows of a matrix at a time. Its second units stand behind the next expert's first ones, so
// that threads seldom wait for each other; what lies between an expert's units is still in a cache.

#include <thread>

#include "experts.h"

using namespace native;

namespace {

// What the first units of an expert of so many rows leave for its second ones: the gradients of [gate | up] and of the
// outputs, packed, and the weighted activations, rows of which are no power of two apart.
struct Kept {
  int64_t D, F, rows;
  float* room;

  // A multiple of a line of memory, as all that is read again and again begins with one.
  int64_t Numbers() const { return PanelsRoom(rows, 2 * F) + PanelsRoom(rows, D) + rows * activated_row(); }

  int64_t activated_row() const { return Whole(F) + kLine; }
  float* hidden() const { return room; }
  float* given() const { return room + PanelsRoom(rows, 2 * F); }
  float* activated() const { return given() + PanelsRoom(rows, D); }

  // Some rows, the first one row r, into panels that hold all of an expert's.
  void Panels(const float* from, int64_t apart, int64_t r, int64_t some, int64_t columns, float* panels) const {
    PackPanels(Matrix<float>{from, apart, 1}, some, columns, panels + PanelRoom(r), PanelRoom(rows));
  }

  // C [columns, width] = (A [rows, columns]) transposed times what is packed. part(r, some) is where rows of A from r on are,
  // `apart` numbers from each other.
  template <typename Part>
  void Outer(const Part& part, int64_t apart, int64_t columns, const float* panels, int64_t width, float* c) const {
    if (rows == 0) std::memset(c, 0, columns * width * sizeof(float));
    for (int64_t r = 0; r < rows; r += kDepth) {
      const int64_t some = std::min(kDepth, rows - r);
      Product(Ready({part(r, some), 1, apart}, columns, some), panels + PanelRoom(r), PanelRoom(rows), width, c, width, r > 0);
    }
  }
};

// The gradients of weight silu(gate) up by gate and up, where `given` is that of the whole, and the whole. Returns the weight's
// gradient. None passes where a factor is cut off.
inline float ActivateBack(int64_t count, const float* gate, const float* up, const float* given, float limit, float weight,
                          float* d_gate, float* d_up, float* whole) {
  Vector sum = {};
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vector g = Some(gate + j, count - j), u = Some(up + j, count - j), d = Some(given + j, count - j);
    const Vector under = Under(g, limit), factor = Between(u, limit), sigmoid = Sigmoid(under), silu = under * sigmoid;
    sum += silu * factor * d;
    Store(g > limit ? Vector{} : weight * d * factor * (sigmoid + silu * (1.0f - sigmoid)), d_gate + j, count - j);
    Store(u > limit || u < -limit ? Vector{} : weight * d * silu, d_up + j, count - j);
    Store(weight * silu * factor, whole + j, count - j);
  }
  float all = 0;
  for (int i = 0; i < kLanes; ++i) all += sum[i];
  return all;
}

// An expert's rows back through both products.
template <typename T>
struct Back {
  const T *gate_up, *down;
  int64_t D, F;
  float limit;
  const float *h, *weights;
  Taken given;
  float *d_weights, *outputs;

  // Numbers that its matrices take when they are packed.
  int64_t PackedRoom() const { return PanelsRoom(D, F) + PanelsRoom(2 * F, D); }

  // Those of a unit, the first of which is the expert's row `row`.
  void Apply(const Unit& u, const Kept& kept, int64_t row) const {
    const bool packed = Fits(PackedRoom()) && u.rows > kRows;
    const int64_t step = packed ? kTall : u.rows, front = packed ? PackedRoom() : 0;
    const int64_t y_row = D + kLanes, h_row = 2 * F + kLanes, a_row = F + kLanes;
    thread_local std::vector<float> space;
    float* first = Room(space, front + step * (y_row + h_row + a_row));
    float *second = first + PanelsRoom(D, F), *dy = first + front, *dh = dy + step * y_row, *da = dh + step * h_row;
    const Matrix<T> turned_down{down, 1, D}, turned_up{gate_up, 1, 2 * F};
    if (packed) {
      Fetch(turned_down, D, F);
      PackWhole(turned_down, D, F, first);
      Fetch(turned_up, 2 * F, D);
      PackWhole(turned_up, 2 * F, D, second);
    }
    for (int64_t r = 0; r < u.rows; r += step, row += step) {
      const int64_t some = std::min(step, u.rows - r), place = u.first + r;
      given.Gather(place, some, 0, D, y_row, dy);
      kept.Panels(dy, y_row, row, some, D, kept.given());
      if (packed)
        ProductOfWhole<T>({dy, y_row, 1}, first, da, a_row, some, F, D);
      else
        Multiply<T>({dy, y_row, 1}, turned_down, da, a_row, some, F, D);
      for (int64_t i = 0; i < some; ++i) {
        const float* own = h + (place + i) * 2 * F;
        const int64_t assignment = given.order[place + i];
        float *own_dh = dh + i * h_row, *activated = kept.activated() + (row + i) * kept.activated_row();
        d_weights[assignment] = ActivateBack(F, own, own + F, da + i * a_row, limit, weights[assignment], own_dh, own_dh + F,
                                             activated);
      }
      kept.Panels(dh, h_row, row, some, 2 * F, kept.hidden());
      if (packed)
        ProductOfWhole<T>({dh, h_row, 1}, second, outputs + place * D, D, some, D, 2 * F);
      else
        Multiply<T>({dh, h_row, 1}, turned_up, outputs + place * D, D, some, D, 2 * F);
    }
  }
};

// A unit of work: some rows of an expert, or, of the gradient of one of its matrices, some rows.
struct Part {
  enum { kBack, kGateUp, kDown } of;
  Unit unit;
};

// dx [N, D], dweight [N, K] and the gradients of gate_up and down, or of no experts where nobody needs these, of dy [N, D].
// h: what `Routed` kept. apart [M, D] and room: for what units leave to others.
template <typename T, ffi::DataType Type>
ffi::Error Gradients(ffi::ThreadPool pool, Floats x, Ints index, Floats weight, ffi::Buffer<Type> gate_up,
                     ffi::Buffer<Type> down, Floats h, Floats dy, ffi::Result<Floats> dx, ffi::Result<Floats> dweight,
                     ffi::Result<Floats> d_gate_up, ffi::Result<Floats> d_down, ffi::Result<Floats> apart,
                     ffi::Result<Floats> room, float limit) {
  const auto id = index.dimensions(), dd = down.dimensions();
  const int64_t N = id[0], K = id[1], M = N * K, E = dd[0], F = dd[1], D = dd[2];
  const bool matrices = d_down->element_count() > 0;
  const T* gate_ups = reinterpret_cast<const T*>(gate_up.untyped_data());
  const T* downs = reinterpret_cast<const T*>(down.untyped_data());
  float *outputs = apart->typed_data(), *d_weights = dweight->typed_data();
  const Sorted sorted(index.typed_data(), M, E);
  const int64_t places = sorted.order.size();
  std::vector<Kept> kepts;
  float* next = room->typed_data();
  for (int64_t e = 0; e < E; ++e) {
    kepts.push_back({D, F, sorted.starts[e + 1] - sorted.starts[e], next});
    next += kepts[e].Numbers();
  }
  if (next > room->typed_data() + room->element_count())
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "The gradients of experts have too little room.");
  const Taken inputs{x.typed_data(), sorted.order.data(), K, D, places};
  const Taken given{dy.typed_data(), sorted.order.data(), K, D, places};
  const auto back = [&](int64_t e) {
    const T *own_up = gate_ups + e * D * 2 * F, *own_down = downs + e * F * D;
    return Back<T>{own_up, own_down, D, F, limit, h.typed_data(), weight.typed_data(), given, d_weights, outputs};
  };
  for (int64_t m = 0; m < M; ++m)
    if (sorted.place[m] < 0) d_weights[m] = 0;
  const int64_t most = std::clamp(M / (4 * Threads(pool)), kFewest, Fits(back(0).PackedRoom()) ? kMost : kBlock);
  std::vector<Part> parts;
  // Of each expert, blocks of rows that are not back yet.
  const std::unique_ptr<std::atomic<int64_t>[]> missing(new std::atomic<int64_t>[E]);
  for (int64_t e = 0; e <= E; ++e) {
    if (e < E) {
      const std::vector<Unit> blocks = sorted.Units(e, most);
      missing[e] = blocks.size();
      for (const Unit& unit : blocks) parts.push_back({Part::kBack, unit});
    }
    if (e == 0 || !matrices) continue;
    for (int64_t d = 0; d < D; d += kBlock) parts.push_back({Part::kGateUp, {e - 1, d, std::min(kBlock, D - d)}});
    for (int64_t f = 0; f < F; f += kBlock) parts.push_back({Part::kDown, {e - 1, f, std::min(kBlock, F - f)}});
  }
  const Sums sums(sorted, outputs, N, K, D, 1, dx->typed_data());
  ForAll(pool, parts.size(), [&](int64_t i) {
    const auto& [of, u] = parts[i];
    const int64_t start = sorted.starts[u.expert];
    const Kept& kept = kepts[u.expert];
    if (of == Part::kBack) {
      back(u.expert).Apply(u, kept, u.first - start);
      sums.Add(u);
      --missing[u.expert];
      return;
    }
    // Threads that have these took them before this part, and wait for nobody.
    while (missing[u.expert] > 0) std::this_thread::yield();
    if (of == Part::kDown) {
      const auto part = [&](int64_t r, int64_t) { return kept.activated() + r * kept.activated_row() + u.first; };
      float* c = d_down->typed_data() + (u.expert * F + u.first) * D;
      kept.Outer(part, kept.activated_row(), u.rows, kept.given(), D, c);
      return;
    }
    thread_local std::vector<float> space;
    const int64_t x_row = u.rows + kLanes;
    float* own_x = Room(space, kDepth * x_row);
    const auto part = [&](int64_t r, int64_t some) {
      inputs.Gather(start + r, some, u.first, u.rows, x_row, own_x);
      return own_x;
    };
    kept.Outer(part, x_row, u.rows, kept.hidden(), 2 * F, d_gate_up->typed_data() + (u.expert * D + u.first) * 2 * F);
  });
  return ffi::Error::Success();
}

}  // namespace

// After h and dy.
#define RESULTS                                                                        \
  .Arg<Floats>().Arg<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>() \
      .Ret<Floats>().Ret<Floats>()
EXPERTS_OF(RoutedGradientsFloat32, Gradients, float, ffi::F32, RESULTS);
EXPERTS_OF(RoutedGradientsBfloat16, Gradients, Bfloat16, ffi::BF16, RESULTS);
EXPERTS_OF(RoutedGradientsBits, Gradients, Bfloat16, ffi::U16, RESULTS);
