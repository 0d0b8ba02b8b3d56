// How many cores this process may use.
#pragma once

#include <cstdint>
#include <string>

namespace adacomcat {

// Cores that the calling thread's affinity allows.
int64_t affinity_cores();

// Cores that the process's control groups allow it at once, of version 1 or 2; 0 if they set no quota.
// `root` comes before the paths of the system's files.
double quota_cores(const std::string& root = "");

// The least of both, at least one. A part of a core counts as one. It is a few milliseconds old.
int64_t usable_cores();

}  // namespace adacomcat
