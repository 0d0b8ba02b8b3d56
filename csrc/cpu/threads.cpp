#include "cpu/threads.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/runtime/cores.h"

namespace adacomcat {

int64_t thread_count() {
  if (is_inside_loop() || at::in_parallel_region()) return 1;
  return std::min<int64_t>(at::get_num_threads(), usable_cores());
}

}  // namespace adacomcat
