// How many threads the CPU kernels run on, and how loops share out their work. They take these functions
// instead of ATen's, whose threads wait for each other at the end of each loop.
#pragma once

#include <cstdint>

#include "cpu/runtime/thread_pool.h"

namespace adacomcat {

// What torch.set_num_threads() says, but no more than the cores that this process may use, and one inside
// of a loop.
int64_t thread_count();

// body(items) on several threads; each takes items 0 … count - 1 until none is left.
template <typename Body>
inline void share_out(int64_t count, const Body& body) {
  run_loop(count, thread_count(),
           {&body, [](const void* object, Items& items) {
              (*static_cast<const Body*>(object))(items);
            }});
}

// body(begin, end) for parts of at least `grain` of begin … end - 1, on several threads.
template <typename Body>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  const int64_t all = end - begin, least = grain > 1 ? grain : 1;
  const int64_t threads = thread_count(), most = (all + least - 1) / least;
  const int64_t parts = threads < most ? threads : most, size = (all + parts - 1) / parts;
  share_out((all + size - 1) / size, [&](Items& items) {
    for (int64_t part; items.take(part);) {
      const int64_t first = begin + part * size;
      body(first, first + size < end ? first + size : end);
    }
  });
}

}  // namespace adacomcat
