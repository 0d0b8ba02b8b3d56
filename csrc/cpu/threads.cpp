#include "cpu/threads.h"

#include <pthread.h>

namespace adacomcat {
namespace {

bool forked = false;  // written in a process that has one thread

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool is_forked() { return forked; }

}  // namespace adacomcat
