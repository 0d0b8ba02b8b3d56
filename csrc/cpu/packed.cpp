#include "packed.h"

#include <c10/core/StorageImpl.h>

#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

namespace adacomcat {

Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK(false, "the CPU kernels take float32, bfloat16 and float16; got ",
                  t.scalar_type());
  }
}

Packed pack_now(const Engine& engine, int64_t k, int64_t n, const void* b, int64_t row,
                int64_t column, Dtype dtype) {
  const int64_t bytes = engine.packed_bytes(k, n);
  void* memory = nullptr;
  const int failed = posix_memalign(&memory, 64, std::max<int64_t>(bytes, 64));
  TORCH_CHECK(failed == 0, "out of memory: ", bytes, " bytes for a packed weight");
  engine.pack(k, n, b, row, column, dtype, memory);
  return {k, n, engine.packed_k(k), bytes, std::shared_ptr<const void>(memory, std::free)};
}

namespace {

using Key = std::tuple<const Engine*, const void*, int64_t, int64_t, int64_t, int64_t, bool>;
using Storage = c10::weak_intrusive_ptr<c10::StorageImpl>;

constexpr int64_t kSamples = 16;

// A few elements spread evenly over the weight.
uint64_t fingerprint(const at::Tensor& weight) {
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

// Whether B[i][j] = (i == j) for so many rows and columns.
bool is_identity(const float* b, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      if (b[i * row + j * column] != (i == j ? 1.0f : 0.0f)) return false;
    }
  }
  return true;
}

void find_identities(Packed& made, const float* b, int64_t row, int64_t column) {
  const auto largest = [&](auto is_one) {
    int64_t size = std::min(made.k, made.n) / kIdentity * kIdentity;
    while (size && !is_one(size)) size -= kIdentity;
    return size;
  };
  made.identity_rows =
      largest([&](int64_t size) { return is_identity(b, size, made.n, row, column); });
  made.identity_columns = largest([&](int64_t size) {
    return is_identity(b + (made.n - size) * column, made.k, size, row, column);
  });
}

// What was asked for after an entry.
struct Follower {
  std::weak_ptr<const void> data;
  int64_t bytes = 0;
};

struct Entry {
  Storage storage;
  uint32_t version;
  uint64_t fingerprint;
  Packed packed;
  std::shared_ptr<Follower> follower = std::make_shared<Follower>();
};

struct Cache {
  std::mutex mutex;
  std::map<Key, Entry> entries;
};

Cache& cache() {
  static Cache* cache = new Cache;  // never destroyed: weights may outlive static destruction
  return *cache;
}

// The entry's weight and what followed it, which is noted for the entry asked for before. Under the
// cache's mutex.
Packed found_after_last(const Entry& entry) {
  thread_local std::weak_ptr<Follower> last;
  if (const auto before = last.lock()) *before = {entry.packed.data, entry.packed.bytes};
  last = entry.follower;
  Packed result = entry.packed;
  result.next = entry.follower->data.lock();
  result.next_bytes = entry.follower->bytes;
  return result;
}

void drop_dead_entries(std::map<Key, Entry>& entries) {
  for (auto it = entries.begin(); it != entries.end();) {
    it = it->second.storage.expired() ? entries.erase(it) : std::next(it);
  }
}

}  // namespace

Packed packed(const Engine& engine, const at::Tensor& weight, bool transposed) {
  const int64_t row = weight.stride(transposed ? 1 : 0), column = weight.stride(transposed ? 0 : 1);
  const int64_t k = weight.size(transposed ? 1 : 0), n = weight.size(transposed ? 0 : 1);
  const void* data = weight.const_data_ptr();
  const auto pack_it = [&] {
    Packed made = pack_now(engine, k, n, data, row, column, dtype_of(weight));
    if (const auto* floats = dtype_of(weight) == Dtype::f32 ? weight.const_data_ptr<float>() : nullptr) {
      find_identities(made, floats, row, column);
    }
    return made;
  };
  if (weight.is_inference()) return pack_it();  // its changes are not counted

  const Key key{&engine, data, k, n, row, column, transposed};
  const uint32_t version = weight._version();
  const uint64_t sample = fingerprint(weight);
  Cache& all = cache();
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.entries.find(key);
    if (found != all.entries.end()) {
      const Entry& entry = found->second;
      const auto alive = entry.storage.lock();
      if (alive.get() == weight.storage().unsafeGetStorageImpl() && entry.version == version &&
          entry.fingerprint == sample) {
        return found_after_last(entry);
      }
    }
  }
  Packed made = pack_it();
  std::lock_guard<std::mutex> lock(all.mutex);
  drop_dead_entries(all.entries);
  const auto [kept, inserted] = all.entries.insert_or_assign(
      key, Entry{weight.storage().getWeakStorageImpl(), version, sample, std::move(made)});
  return found_after_last(kept->second);
}

}  // namespace adacomcat
