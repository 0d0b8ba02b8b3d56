#include "cpu/runtime/scratch.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace adacomcat {
namespace {

std::atomic<int64_t> held{0};

}  // namespace

int64_t scratch_bytes() { return held.load(); }

ThreadMemory::ThreadMemory(Buffer& buffer, std::initializer_list<int64_t> sizes) : buffer_(buffer) {
  if (buffer.taken || sizes.size() > kMostPieces) {
    throw std::logic_error(
        "a thread may hold one Scratch and one Workspace at a time, of few pieces");
  }
  std::copy(sizes.begin(), sizes.end(), sizes_);
  int64_t needed = 64;
  for (const int64_t size : sizes) needed += aligned(size);
  const int64_t more = needed - static_cast<int64_t>(buffer.bytes.size());
  if (more > 0) {
    buffer.bytes.resize(needed);
    held += more;
  }
  buffer.taken = true;
  const auto start = reinterpret_cast<uintptr_t>(buffer.bytes.data());
  next_ = reinterpret_cast<char*>((start + 63) & ~uintptr_t{63});
}

Scratch::Scratch(std::initializer_list<int64_t> sizes)
    : ThreadMemory(
          []() -> Buffer& {
            thread_local Buffer buffer;
            return buffer;
          }(),
          sizes) {}

Workspace::Workspace(std::initializer_list<int64_t> sizes)
    : ThreadMemory(
          []() -> Buffer& {
            thread_local Buffer buffer;
            return buffer;
          }(),
          sizes) {}

}  // namespace adacomcat
