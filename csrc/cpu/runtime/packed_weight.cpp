#include "cpu/runtime/packed_weight.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/isa.h"
#include "cpu/threads.h"

namespace adacomcat {
namespace {

// What stands before the panels.
struct Header {
  static constexpr char kMagic[8] = {'p', 'a', 'n', 'e', 'l', 's', '0', '1'};

  char magic[8];
  int64_t engine;  // its index among all
  int64_t k, n, transposed;
  int64_t dtype;  // of the weight
  int64_t identity_rows, identity_columns;
};
static_assert(sizeof(Header) == 64, "panels stay aligned to cache lines");

// B (k, n) with its strides, in the memory of a weight, and the scales (n) of its columns for 8 bits.
struct Source {
  int64_t k, n, row, column;
  const void* data;
  Dtype dtype;
  const float* scales = nullptr;

  Source(const Tensor& weight, bool transposed)
      : k(weight.size(transposed)), n(weight.size(!transposed)), row(weight.stride(transposed)),
        column(weight.stride(!transposed)), data(weight.const_data_ptr()), dtype(dtype_of(weight)) {
  }
};

// Whether b[i][j] = (i == j) for i < rows and j < columns.
bool is_identity(const float* b, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      if (b[i * row + j * column] != (i == j ? 1.0f : 0.0f)) return false;
    }
  }
  return true;
}

void find_identities(PackedWeight& packed, const Source& source) {
  const float* b = static_cast<const float*>(source.data);
  const int64_t row = source.row, column = source.column;
  const auto largest = [&](auto is_one) {
    int64_t size = std::min(packed.k, packed.n) / kIdentityStep * kIdentityStep;
    while (size && !is_one(size)) size -= kIdentityStep;
    return size;
  };
  packed.identity_rows =
      largest([&](int64_t size) { return is_identity(b, size, packed.n, row, column); });
  packed.identity_columns = largest([&](int64_t size) {
    return is_identity(b + (packed.n - size) * column, packed.k, size, row, column);
  });
}

// Packs the panels; threads share them out.
void pack_panels(const Engine& engine, const Source& b, char* to) {
  constexpr int64_t kElements = 1 << 15;  // that are worth a thread
  const int64_t width = engine.panel_columns(), panels = ceil_div(b.n, width);
  const int64_t bytes = engine.packed_k(b.k) * width * engine.packed_size;
  const int64_t grain = ceil_div(kElements, std::max<int64_t>(b.k * width, 1));
  parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * width, columns = std::min(end * width, b.n) - first;
    const char* from = static_cast<const char*>(b.data) + first * b.column * dtype_size(b.dtype);
    engine.pack(b.k, columns, from, b.row, b.column, b.dtype, to + begin * bytes,
                b.scales ? b.scales + first : nullptr);
  });
}

// Packs `b` behind `before` bytes.
PackedWeight pack(const Engine& engine, const Source& b, int64_t before) {
  PackedWeight packed;
  packed.k = b.k, packed.n = b.n, packed.rows = engine.packed_k(b.k);
  packed.bytes = engine.packed_bytes(b.k, b.n);
  // A weight without elements has an address too, for ops tell by it whether there is one.
  packed.memory = empty({std::max<int64_t>(before + packed.bytes, 64)}, ScalarType::Byte);
  char* data = static_cast<char*>(packed.memory->mutable_data_ptr()) + before;
  packed.data = data;
  pack_panels(engine, b, data);
  if (b.dtype == Dtype::f32 && !b.scales) find_identities(packed, b);
  return packed;
}

const Header& header_of(const Tensor& packed) {
  return *static_cast<const Header*>(packed.const_data_ptr());
}

// Throws if the bytes are not those of a packed weight.
void check_packed(const Tensor& packed) {
  const int64_t size = packed.numel();
  REQUIRE(size >= static_cast<int64_t>(sizeof(Header)) && packed.is_contiguous() &&
              !std::memcmp(header_of(packed).magic, Header::kMagic, sizeof Header::kMagic),
          "these bytes are no packed weight");
  const Header& h = header_of(packed);
  const Engine* engine = engine_at(h.engine);
  REQUIRE(engine,
          "a weight was packed for an instruction set that does not run here; pack it "
          "again");
  REQUIRE(size == static_cast<int64_t>(sizeof(Header)) + engine->packed_bytes(h.k, h.n),
          "a packed weight is cut off");
}

// Which packed weight followed which in the last pass over a model. Its places are found by address and may
// be overwritten at any time, by any thread: a wrong entry costs a prefetch.
struct Successor {
  std::atomic<const void*> weight{nullptr}, next{nullptr};
  std::atomic<int64_t> bytes{0};
};

Successor& successor_of(const void* weight) {
  constexpr uint64_t kPlaces = 1024;
  static Successor table[kPlaces];
  return table[(reinterpret_cast<uintptr_t>(weight) / 64 * 0x9e3779b97f4a7c15ull) >> 54];
}

// What followed this weight the last time. Notes it as what follows the one before, on this thread.
PrefetchHint successor(const void* weight, int64_t bytes) {
  constexpr auto relaxed = std::memory_order_relaxed;
  thread_local Successor* before = nullptr;
  if (before && before->next.load(relaxed) != weight) {
    before->next.store(weight, relaxed), before->bytes.store(bytes, relaxed);
  }
  Successor& own = successor_of(weight);
  before = &own;
  if (own.weight.load(relaxed) != weight) {
    own.weight.store(weight, relaxed), own.next.store(nullptr, relaxed);
    return {};
  }
  const void* next = own.next.load(relaxed);
  return next ? PrefetchHint{next, own.bytes.load(relaxed)} : PrefetchHint{};
}

// The packed weight with its header.
Tensor pack_with_header(const Engine& e, const Source& source, bool transposed) {
  const PackedWeight packed = pack(e, source, sizeof(Header));
  Header header{{},
                index_of(e),
                packed.k,
                packed.n,
                transposed,
                static_cast<int64_t>(source.dtype),
                packed.identity_rows,
                packed.identity_columns};
  std::memcpy(header.magic, Header::kMagic, sizeof header.magic);
  std::memcpy(packed.memory->mutable_data_ptr(), &header, sizeof header);
  return *packed.memory;
}

Tensor pack_weight(const Tensor& weight, bool transposed) {
  REQUIRE(weight.dim() == 2, "a matrix expected, got ", weight.sizes());
  return pack_with_header(engine(dtype_of(weight)), Source(weight, transposed), transposed);
}

Tensor pack_int8_weight(const Tensor& weight, const Tensor& scale, bool transposed) {
  REQUIRE(weight.dim() == 2, "a matrix expected, got ", weight.sizes());
  REQUIRE(scale.dim() == 1 && scale.size(0) == weight.size(!transposed) &&
              scale.scalar_type() == ScalarType::Float && scale.is_contiguous(),
          "a float32 scale for each of the ", weight.size(!transposed), " outputs expected, got ",
          scale.scalar_type(), " of ", scale.sizes());
  Source source(weight, transposed);
  source.scales = scale.const_data_ptr<float>();
  return pack_with_header(int8_engine(), source, transposed);
}

// Of a packed weight: bytes of the header, panel columns, packed rows, rows that are adjacent in a column,
// bytes of an element, rows of scales, and what is added to integers. ops/packing.py reads weights back by
// them.
std::vector<int64_t> packed_layout(const Tensor& packed) {
  check_packed(packed);
  const Header& h = header_of(packed);
  const Engine& e = *engine_at(h.engine);
  return {static_cast<int64_t>(sizeof(Header)),
          e.panel_columns(),
          e.packed_k(h.k),
          e.packed_group,
          e.packed_size,
          e.scale_rows,
          e.packed_zero};
}

}  // namespace

bool is_packed(const Tensor& weight) {
  static const int32_t bytes = dtype_code(ScalarType::Byte);
  return weight.dim() == 1 && dtype_code(weight) == bytes;
}

int64_t weight_size(const Tensor& weight, int64_t dimension) {
  if (!is_packed(weight)) return weight.size(dimension);
  check_packed(weight);
  const Header& h = header_of(weight);
  return (dimension == 0) == (h.transposed != 0) ? h.n : h.k;
}

void check_weight(const Tensor& x, const Tensor& weight, const char* name, Sizes shape) {
  if (!is_packed(weight)) return check_like(x, weight, name, shape);
  REQUIRE(x.is_cpu() && weight.is_cpu(), name, " is packed for CPUs");
  REQUIRE(weight_size(weight, 0) == shape[0] && weight_size(weight, 1) == shape[1], name,
          " was packed from a matrix (", weight_size(weight, 0), ", ", weight_size(weight, 1),
          "); ", shape, " expected");
  REQUIRE(header_of(weight).dtype == static_cast<int64_t>(dtype_of(x)), name,
          " was packed from another dtype than x has");
}

const Engine& engine_for(const Tensor& x, const Tensor& weight) {
  if (!is_packed(weight)) return engine(dtype_of(x));
  check_packed(weight);
  return *engine_at(header_of(weight).engine);
}

PackedWeight read_weight(const Engine& engine, const Tensor& weight, bool transposed) {
  if (!is_packed(weight)) return pack(engine, Source(weight, transposed), 0);
  check_packed(weight);
  const Header& h = header_of(weight);
  REQUIRE(engine_at(h.engine) == &engine && (h.transposed != 0) == transposed,
          "the weights of an op must be packed together, in one way");
  PackedWeight packed;
  packed.k = h.k, packed.n = h.n, packed.rows = engine.packed_k(h.k);
  packed.bytes = engine.packed_bytes(h.k, h.n);
  packed.data = &h + 1;
  packed.next_weight = successor(packed.data, packed.bytes);
  packed.identity_rows = h.identity_rows, packed.identity_columns = h.identity_columns;
  return packed;
}

}  // namespace adacomcat

STABLE_TORCH_LIBRARY_FRAGMENT(adacomcat, m) {
  m.def("pack_weight_cpu(Tensor weight, bool transposed) -> Tensor");
  m.def("pack_int8_weight_cpu(Tensor weight, Tensor scale, bool transposed) -> Tensor");
  m.def("packed_layout_cpu(Tensor packed) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(adacomcat, CPU, m) {
  m.impl("pack_weight_cpu", TORCH_BOX(&adacomcat::pack_weight));
  m.impl("pack_int8_weight_cpu", TORCH_BOX(&adacomcat::pack_int8_weight));
  m.impl("packed_layout_cpu", TORCH_BOX(&adacomcat::packed_layout));
}
