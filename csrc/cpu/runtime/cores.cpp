#include "cpu/runtime/cores.h"

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>

namespace adacomcat {
namespace {

using Clock = std::chrono::steady_clock;

// Quota over period in a file of version 2: "max 100000" or "150000 100000".
double quota_of_v2(const std::string& folder) {
  std::string quota;
  double period = 0;
  std::ifstream file(folder + "/cpu.max");
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return 0;
  return std::strtod(quota.c_str(), nullptr) / period;
}

double quota_of_v1(const std::string& folder) {
  double quota = 0, period = 0;
  std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
  std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  return quota > 0 && period > 0 ? quota / period : 0;
}

// The least quota of a group and of those that it lies in; 0 if none has one.
template <typename QuotaOf>
double least_quota(const std::string& root, std::string group, QuotaOf quota_of) {
  double least = 0;
  for (;;) {
    const double one = quota_of(root + group);
    if (one > 0 && (least == 0 || one < least)) least = one;
    const size_t slash = group.rfind('/');
    if (group.empty() || slash == std::string::npos) return least;
    group.resize(slash);
  }
}

bool has_cpu(const std::string& controllers) {
  return ("," + controllers + ",").find(",cpu,") != std::string::npos;
}

}  // namespace

int64_t affinity_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(CPU_COUNT(&set), 1);
#endif
  return std::max<int64_t>(std::thread::hardware_concurrency(), 1);
}

double quota_cores(const std::string& root) {
  std::ifstream groups(root + "/proc/self/cgroup");
  double least = 0;
  for (std::string line; std::getline(groups, line);) {  // "0::/group" or "4:cpu,cpuacct:/group"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1) == "/" ? "" : line.substr(second + 1);
    double quota = 0;
    if (controllers.empty()) {
      quota = least_quota(root + "/sys/fs/cgroup", group, quota_of_v2);
    } else if (has_cpu(controllers)) {
      quota = least_quota(root + "/sys/fs/cgroup/" + controllers, group, quota_of_v1);
    }
    if (quota > 0 && (least == 0 || quota < least)) least = quota;
  }
  return least;
}

int64_t usable_cores() {
  // Asking the system for each op would cost as much as a small op.
  constexpr std::chrono::milliseconds kAffinityAge{5}, kQuotaAge{1000};
  static std::atomic<int64_t> quota{0};
  static std::atomic<Clock::rep> quota_due{0};
  thread_local int64_t cores = 0;
  thread_local Clock::time_point due{};
  const Clock::time_point now = Clock::now();
  if (now < due) return cores;
  due = now + kAffinityAge;
  Clock::rep seen = quota_due.load();
  const Clock::rep next = (now + kQuotaAge).time_since_epoch().count();
  if (now.time_since_epoch().count() >= seen && quota_due.compare_exchange_strong(seen, next)) {
    quota = static_cast<int64_t>(std::ceil(quota_cores()));
  }
  cores = affinity_cores();
  if (quota > 0) cores = std::min<int64_t>(cores, quota);
  return cores;
}

}  // namespace adacomcat
