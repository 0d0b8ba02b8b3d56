// Loops of the thread pool from several threads at once: every item runs once, an exception reaches its
// caller, a loop inside a loop ends, a forked child has helpers again. Returns 0 if all of that holds.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/runtime/cores.h"
#include "cpu/runtime/thread_pool.h"

namespace {

using adacomcat::Items;

template <typename Body>
void loop(int64_t count, int64_t threads, const Body& body) {
  adacomcat::run_loop(count, threads, {&body, [](const void* object, Items& items) {
                        (*static_cast<const Body*>(object))(items);
                      }});
}

// Sums that each item writes without a lock, and the caller reads after the loop.
bool runs_every_item_once(int64_t count, int64_t threads) {
  std::vector<int> runs(count, 0);
  loop(count, threads, [&](Items& items) {
    for (int64_t i; items.take(i);) ++runs[i];
  });
  for (const int n : runs) {
    if (n != 1) return false;
  }
  return true;
}

bool throws(int64_t count, int64_t threads, int64_t bad) {
  try {
    loop(count, threads, [&](Items& items) {
      for (int64_t i; items.take(i);) {
        if (i == bad) throw std::runtime_error("an item failed");
      }
    });
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

bool runs_inside(int64_t count, int64_t threads) {
  std::atomic<int64_t> runs{0};
  loop(count, threads, [&](Items& items) {
    for (int64_t i; items.take(i);) {
      loop(count, threads, [&](Items& more) {
        for (int64_t j; more.take(j);) ++runs;
      });
    }
  });
  return runs == count * count;
}

// Whether another thread than the caller takes an item, if it is given a second to come. A process that
// may use one core has no helpers.
bool has_helpers() {
  if (adacomcat::affinity_cores() < 2) return true;
  const auto caller = std::this_thread::get_id();
  std::atomic<bool> helped{false};
  loop(2, 2, [&](Items& items) {
    for (int64_t i; items.take(i);) {
      if (std::this_thread::get_id() != caller) helped = true;
      for (int wait = 0; wait < 1000 && !helped; ++wait) usleep(1000);
    }
  });
  return helped;
}

bool forked_child_has_helpers() {
  const pid_t child = fork();
  if (!child) _exit(has_helpers() && runs_every_item_once(100, 4) ? 0 : 1);
  int status = 1;
  waitpid(child, &status, 0);
  return status == 0;
}

bool holds(const char* what, bool value) {
  if (!value) std::fprintf(stderr, "fails: %s\n", what);
  return value;
}

}  // namespace

// stress ROUNDS CALLERS FORKS
int main(int, char** arguments) {
  const int rounds = std::atoi(arguments[1]), callers = std::atoi(arguments[2]);
  const int children = std::atoi(arguments[3]);
  std::atomic<bool> fine{true};
  std::vector<std::thread> threads;
  for (int caller = 0; caller < callers; ++caller) {
    threads.emplace_back([&fine, rounds, caller] {
      for (int round = 0; round < rounds && fine; ++round) {
        const int64_t count = 1 + (round * 7 + caller) % 40, wanted = 2 + round % 7;
        fine = holds("every item runs once", runs_every_item_once(count, wanted)) &&
               holds("an exception reaches its caller", throws(count, wanted, round % count)) &&
               holds("a loop inside a loop", runs_inside(1 + count % 5, wanted)) && fine;
      }
    });
  }
  bool forks = true;
  for (int i = 0; i < children; ++i) forks &= forked_child_has_helpers();
  for (std::thread& thread : threads) thread.join();
  return fine && holds("a forked child has helpers", forks) && holds("helpers", has_helpers()) ? 0
                                                                                              : 1;
}
