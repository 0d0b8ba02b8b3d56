// How many threads the CPU kernels run on. They take these functions instead of ATen's.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

namespace adacomcat {

// Whether this process is a child of fork(). OpenMP's other threads did not come along: a parallel region of
// the forked thread would wait for them for ever.
bool is_forked();

// One in a forked child.
inline int64_t thread_count() { return is_forked() ? 1 : at::get_num_threads(); }

// body(begin, end) for parts of at least `grain` of begin … end - 1, on several threads.
template <typename Body>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (!is_forked()) return at::parallel_for(begin, end, grain, body);
  if (begin < end) body(begin, end);
}

}  // namespace adacomcat
