#include "cpu/threads.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/runtime/cores.h"

namespace adacomcat {

int64_t thread_count() {
  if (is_inside_loop()) return 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), usable_cores());
}

}  // namespace adacomcat
