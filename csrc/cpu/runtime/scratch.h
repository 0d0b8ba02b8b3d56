// Memory that a thread keeps from call to call, so that ops do not get theirs from the system page by
// page. Ops take it as pieces: Scratch scratch({bytes, bytes}); scratch.next() is the first piece.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace adacomcat {

// Bytes that all threads hold.
int64_t scratch_bytes();

class ThreadMemory {
 public:
  ThreadMemory(const ThreadMemory&) = delete;
  ~ThreadMemory() { buffer_.taken = false; }

  // The next piece, aligned to 64 bytes.
  template <typename T = void>
  T* next() {
    char* piece = next_;
    next_ += aligned(sizes_[index_++]);
    return reinterpret_cast<T*>(piece);
  }

 protected:
  struct Buffer {
    std::vector<char> bytes;
    bool taken = false;
  };

  ThreadMemory(Buffer& buffer, std::initializer_list<int64_t> sizes);

 private:
  static constexpr int kMostPieces = 8;
  static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  Buffer& buffer_;
  int64_t sizes_[kMostPieces];
  int index_ = 0;
  char* next_;
};

// What a thread needs for its part of an op. A thread has one Scratch at a time: a second one would
// alias the first, and fails.
class Scratch : public ThreadMemory {
 public:
  explicit Scratch(std::initializer_list<int64_t> sizes);
};

// What the threads of an op hand over to each other, in the memory of the calling thread. It may be
// alive beside a Scratch, and a thread has one at a time, too.
class Workspace : public ThreadMemory {
 public:
  explicit Workspace(std::initializer_list<int64_t> sizes);
};

}  // namespace adacomcat
