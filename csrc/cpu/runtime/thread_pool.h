// The threads that share the work of an op: one pool for the process, whoever calls.
//
// A loop is a number of items, cut into one share for each thread. The caller starts at once, and helpers
// that are awake join it. Each thread takes the items of its own share in order, then those that others have
// not begun. The caller waits for helpers that have begun an item, never for one that has not come: its core
// may have been given to another program.
#pragma once

#include <atomic>
#include <cstdint>

namespace adacomcat {

// Consecutive items of a loop, and the first one that nobody has taken.
struct alignas(64) Share {
  std::atomic<int64_t> next{0}, end{0};

  int64_t last() const { return end.load(std::memory_order_relaxed); }
};

// What one thread takes of a loop.
class Items {
 public:
  Items(Share* shares, int64_t count, int64_t own)
      : shares_(shares), count_(count), own_(own % count) {}

  // Takes an item that nobody has taken. Returns whether there was one.
  bool take(int64_t& item) {
    for (; passed_ < count_; ++passed_) {
      Share& share = shares_[(own_ + passed_) % count_];
      if (share.next.load(std::memory_order_relaxed) >= share.last()) continue;
      item = share.next.fetch_add(1, std::memory_order_relaxed);
      if (item < share.last()) return true;
    }
    return false;
  }

  // Whether the thread's own share is used up.
  bool own_is_done() const {
    return passed_ > 0 || shares_[own_].next.load(std::memory_order_relaxed) >= shares_[own_].last();
  }

 private:
  Share* shares_;
  int64_t count_, own_, passed_ = 0;
};

// What a loop calls once on each of its threads.
struct LoopBody {
  const void* object;
  void (*call)(const void* object, Items& items);

  void operator()(Items& items) const { call(object, items); }
};

// Whether this thread is inside a loop. A loop inside a loop runs on its thread alone.
bool is_inside_loop();

// Runs the body for items 0 … count - 1 on at most `threads` threads. An exception of any of them is thrown
// when all have ended.
void run_loop(int64_t count, int64_t threads, LoopBody body);

}  // namespace adacomcat
