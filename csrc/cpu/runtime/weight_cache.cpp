#include "cpu/runtime/weight_cache.h"

#include <c10/core/StorageImpl.h>
#include <pthread.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

namespace adacomcat {
namespace {

using Key = std::tuple<const Engine*, const void*, int64_t, int64_t, int64_t, int64_t, bool>;
using Storage = c10::weak_intrusive_ptr<c10::StorageImpl>;

// B (k, n) with its strides, in the memory of a weight.
struct Source {
  int64_t k, n, row, column;
  const void* data;
  Dtype dtype;

  Source(const at::Tensor& weight, bool transposed)
      : k(weight.size(transposed)), n(weight.size(!transposed)), row(weight.stride(transposed)),
        column(weight.stride(!transposed)), data(weight.const_data_ptr()), dtype(dtype_of(weight)) {
  }
};

// A hash of a few elements, spread evenly over the weight.
uint64_t fingerprint(const at::Tensor& weight) {
  constexpr int64_t kSamples = 16;
  const int64_t rows = weight.size(0), columns = weight.size(1), size = weight.element_size();
  if (!rows || !columns) return 0;
  const char* data = static_cast<const char*>(weight.const_data_ptr());
  uint64_t hash = 0;
  for (int64_t s = 0; s < kSamples; ++s) {
    const int64_t i = s * rows / kSamples, j = (s * 37 + 11) % columns;
    uint32_t bits = 0;
    std::memcpy(&bits, data + (i * weight.stride(0) + j * weight.stride(1)) * size, size);
    hash = (hash ^ bits) * 0x9e3779b97f4a7c15ull;
    hash ^= hash >> 29;
  }
  return hash;
}

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

PackedWeight pack(const Engine& engine, const Source& source) {
  const int64_t bytes = engine.packed_bytes(source.k, source.n);
  void* memory = nullptr;
  const int failed = posix_memalign(&memory, 64, std::max<int64_t>(bytes, 64));
  TORCH_CHECK(failed == 0, "out of memory: ", bytes, " bytes for a packed weight");
  engine.pack(source.k, source.n, source.data, source.row, source.column, source.dtype, memory);
  PackedWeight packed{source.k, source.n, engine.packed_k(source.k), bytes,
                      std::shared_ptr<const void>(memory, std::free)};
  if (source.dtype == Dtype::f32) find_identities(packed, source);
  return packed;
}

// The weight that was asked for after an entry.
struct NextWeight {
  std::weak_ptr<const void> data;
  int64_t bytes = 0;
};

struct Entry {
  Storage storage;
  uint32_t version;
  uint64_t fingerprint;
  PackedWeight packed;
  std::shared_ptr<NextWeight> next = std::make_shared<NextWeight>();
};

struct Cache {
  std::mutex mutex;
  std::map<Key, Entry> entries;
};

Cache& cache() {
  static Cache* cache = new Cache;  // never destroyed: weights may outlive static destruction
  return *cache;
}

// A fork waits until no other thread holds the mutex: the child has no thread that would unlock it.
[[maybe_unused]] const int registered = pthread_atfork([] { cache().mutex.lock(); },
                                                       [] { cache().mutex.unlock(); },
                                                       [] { cache().mutex.unlock(); });

// The entry's packed weight. Notes it as the next one of the entry that this thread asked for before. The
// caller holds the cache's mutex.
PackedWeight take(const Entry& entry) {
  thread_local std::weak_ptr<NextWeight> last;
  if (const auto before = last.lock()) *before = {entry.packed.data, entry.packed.bytes};
  last = entry.next;
  PackedWeight result = entry.packed;
  result.next = entry.next->data.lock();
  result.next_bytes = entry.next->bytes;
  return result;
}

void drop_dead_entries(std::map<Key, Entry>& entries) {
  for (auto it = entries.begin(); it != entries.end();) {
    it = it->second.storage.expired() ? entries.erase(it) : std::next(it);
  }
}

}  // namespace

PackedWeight pack_weight(const Engine& engine, const at::Tensor& weight, bool transposed) {
  const Source source(weight, transposed);
  if (weight.is_inference()) return pack(engine, source);

  const Key key{&engine, source.data, source.k, source.n, source.row, source.column, transposed};
  const uint32_t version = weight._version();
  const uint64_t sample = fingerprint(weight);
  Cache& all = cache();
  c10::intrusive_ptr<c10::StorageImpl> alive;  // released without the mutex
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.entries.find(key);
    if (found != all.entries.end()) {
      const Entry& entry = found->second;
      alive = entry.storage.lock();
      if (alive.get() == weight.storage().unsafeGetStorageImpl() && entry.version == version &&
          entry.fingerprint == sample) {
        return take(entry);
      }
    }
  }
  PackedWeight made = pack(engine, source);
  std::lock_guard<std::mutex> lock(all.mutex);
  drop_dead_entries(all.entries);
  const auto [kept, inserted] = all.entries.insert_or_assign(
      key, Entry{weight.storage().getWeakStorageImpl(), version, sample, std::move(made)});
  return take(kept->second);
}

}  // namespace adacomcat
