#include "cpu/runtime/thread_pool.h"

#include <pthread.h>
#include <signal.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <exception>
#include <system_error>
#include <thread>
#include <utility>

#include "cpu/runtime/cores.h"

namespace adacomcat {
namespace {

using Clock = std::chrono::steady_clock;

// How long a thread looks for what it waits for before it sleeps. Waking costs some 50 µs, and ops of one
// forward pass follow each other within 20.
constexpr std::chrono::microseconds kIdleSpin{100}, kEndSpin{50};

// Nanoseconds that a helper has been on a core at least, if it was on one during kEndSpin.
constexpr int64_t kLeastProgress = 5000;

constexpr int64_t kMostThreads = 128, kMostLoops = 16;

thread_local bool inside = false;

class Inside {
 public:
  Inside() { inside = true; }
  ~Inside() { inside = false; }
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Spins until `done` or for this long. Returns whether it is done.
template <typename Done>
bool spin(std::chrono::microseconds most, Done done) {
  const auto end = Clock::now() + most;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return done();
}

// Sleep while the word has this value, and waking of one that sleeps. std::atomic has the same, but yields its
// core before it sleeps: to a busy program that means for a time slice.
void sleep_on(std::atomic<uint32_t>& word, uint32_t value) {
#ifdef __linux__
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  word.wait(value);
#endif
}

void wake_one(std::atomic<uint32_t>& word) {
#ifdef __linux__
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
#else
  word.notify_one();
#endif
}

// Where a helper is. A caller that waits for one whose core another program has gives it its own core.
class Helper {
 public:
  // Called by the helper, when it starts.
  void start() {
#ifdef __linux__
    thread_ = gettid();
    pthread_getcpuclockid(pthread_self(), &clock_);
#endif
  }

  std::atomic<const void*> loop{nullptr};  // that it is in

  int64_t time_on_a_core() const {
#ifdef __linux__
    timespec spent{};
    clock_gettime(clock_, &spent);
    return spent.tv_sec * int64_t{1000000000} + spent.tv_nsec;
#else
    return 0;
#endif
  }

  // Moves the helper to the core of the caller, which is about to sleep.
  void fetch() {
#ifdef __linux__
    const int core = sched_getcpu();
    if (core < 0 || core >= CPU_SETSIZE || fetched_to_.load() >= 0) return;
    if (sched_getaffinity(thread_, sizeof allowed_, &allowed_)) return;
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET(core, &here);
    fetched_to_.store(core);
    sched_setaffinity(thread_, sizeof here, &here);
#endif
  }

  // Called by the helper: leaves the core that it was moved to, for the caller needs it again.
  void go_back() {
#ifdef __linux__
    const int core = fetched_to_.exchange(-1);
    if (core < 0) return;
    cpu_set_t others = allowed_;
    CPU_CLR(core, &others);
    if (CPU_COUNT(&others)) sched_setaffinity(0, sizeof others, &others);
    sched_setaffinity(0, sizeof allowed_, &allowed_);
#endif
  }

 private:
#ifdef __linux__
  pid_t thread_ = 0;
  clockid_t clock_{};
  cpu_set_t allowed_{};
  std::atomic<int> fetched_to_{-1};
#endif
};

// A place for a loop. It is never freed, so helpers may look at it at any time.
struct Loop {
  static constexpr uint32_t kInside = 0xff, kWanted = 8;

  std::atomic<bool> taken{false};
  // Helpers that are inside, in the low byte, and above it how many may be: none while it is closed.
  std::atomic<uint32_t> state{0};
  LoopBody body{};
  int64_t count = 0;
  Share shares[kMostThreads];
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  // Takes the place, unless another loop has it.
  bool claim() { return !taken.load() && !taken.exchange(true); }

  void open(int64_t items, int64_t threads, LoopBody what) {
    body = what, count = threads, failed = false, error = nullptr;
    for (int64_t i = 0; i < threads; ++i) {
      shares[i].next.store(items * i / threads, std::memory_order_relaxed);
      shares[i].end.store(items * (i + 1) / threads, std::memory_order_relaxed);
    }
    state.store(static_cast<uint32_t>(threads - 1) << kWanted, std::memory_order_release);
  }

  // Whether there may be an item that nobody has taken.
  bool has_items() const {
    for (int64_t i = 0; i < wanted(); ++i) {
      if (shares[i].next.load(std::memory_order_relaxed) < shares[i].last()) return true;
    }
    return false;
  }

  // The threads that the loop may have; none while it is closed.
  int64_t wanted() const {
    const uint32_t helpers = state.load(std::memory_order_acquire) >> kWanted;
    return helpers ? helpers + 1 : 0;
  }

  // A helper enters, unless the loop is closed or has all its threads.
  bool enter() {
    uint32_t seen = state.load(std::memory_order_relaxed);
    while ((seen & kInside) < seen >> kWanted) {
      if (state.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire)) return true;
    }
    return false;
  }

  void leave() {
    if (state.fetch_sub(1, std::memory_order_release) == 1) wake_one(state);
  }

  void run(int64_t own) {
    const Inside here;
    try {
      Items items(shares, count, own);
      body(items);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }

  // No other helper enters. Returns whether all have left.
  bool close() { return (state.fetch_and(kInside, std::memory_order_acq_rel) & kInside) == 0; }

  // Waits until the helpers that are inside have left.
  void wait_for(Helper* helpers, int64_t count) {
    const auto empty = [&] { return state.load(std::memory_order_acquire) == 0; };
    Helper* const last = std::find_if(helpers, helpers + count,
                                      [&](const Helper& h) { return h.loop.load() == this; });
    const bool known = last != helpers + count;
    const int64_t before = known ? last->time_on_a_core() : 0;
    if (spin(kEndSpin, empty)) return;
    if (known && last->loop.load() == this && last->time_on_a_core() - before < kLeastProgress) {
      last->fetch();
    }
    for (uint32_t seen; (seen = state.load(std::memory_order_acquire));) sleep_on(state, seen);
  }
};

class Pool {
 public:
  void run(int64_t count, int64_t threads, LoopBody body) {
    Loop* loop = claim_loop();
    if (!loop) return run_alone(count, body);
    hire(threads - 1);
    cores_.store(usable_cores(), std::memory_order_relaxed);
    busy_.fetch_add(1);
    loop->open(count, threads, body);
    call_helpers(threads - 1);
    loop->run(0);
    if (!loop->close()) loop->wait_for(helping_, helpers_.load());
    busy_.fetch_sub(1);
    const std::exception_ptr error = std::exchange(loop->error, nullptr);
    loop->taken.store(false);
    if (error) std::rethrow_exception(error);
  }

  static void run_alone(int64_t count, LoopBody body) {
    Share all;
    all.end.store(count, std::memory_order_relaxed);
    Items items(&all, 1, 0);
    body(items);
  }

 private:
  Loop* claim_loop() {
    for (Loop& loop : loops_) {
      if (loop.claim()) return &loop;
    }
    return nullptr;
  }

  // Starts helpers until there are this many; fewer where the system gives no more threads.
  void hire(int64_t wanted) {
    if (helpers_.load(std::memory_order_relaxed) >= wanted || hiring_.exchange(true)) return;
    sigset_t all, before;  // signals are for the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      while (helpers_.load(std::memory_order_relaxed) < wanted) {
        const int64_t id = helpers_.load(std::memory_order_relaxed) + 1;
        std::thread([this, id] { help(id); }).detach();
        helpers_.store(id, std::memory_order_relaxed);
      }
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    hiring_.store(false);
  }

  // Whether a core is left for one more helper.
  bool has_idle_core() const { return busy_.load() < cores_.load(std::memory_order_relaxed); }

  void call_helpers(int64_t wanted) {
    published_.fetch_add(1);
    if (!has_idle_core()) return;
    for (int64_t i = std::min<int64_t>(wanted, sleeping_.load()); i > 0; --i) {
      wake_one(published_);
    }
  }

  // Joins an open loop. Returns whether there was one.
  bool help_any(int64_t id) {
    for (int64_t i = 0; i < kMostLoops; ++i) {
      Loop& loop = loops_[(id - 1 + i) % kMostLoops];
      // A loop whose last items are being run is open still: who entered it would come back at once.
      if (!loop.has_items() || !loop.enter()) continue;
      Helper& self = helping_[id - 1];
      self.loop = &loop;
      loop.run(id);
      self.loop = nullptr;
      loop.leave();
      self.go_back();
      return true;
    }
    return false;
  }

  void help(int64_t id) {
    helping_[id - 1].start();
    for (;;) {
      const uint32_t seen = published_.load();
      if (has_idle_core()) {
        busy_.fetch_add(1);
        const bool helped = help_any(id);
        busy_.fetch_sub(1);
        if (helped) continue;
      }
      const auto called = [&] { return published_.load() != seen; };
      if (has_idle_core() && spin(kIdleSpin, called)) continue;
      sleeping_.fetch_add(1);
      sleep_on(published_, seen);
      sleeping_.fetch_sub(1);
    }
  }

  Loop loops_[kMostLoops];
  Helper helping_[kMostThreads];
  std::atomic<int64_t> busy_{0}, helpers_{0}, sleeping_{0};  // busy: callers and helpers in loops
  std::atomic<int64_t> cores_{1};  // of the last caller: a helper that was fetched is bound to one itself
  std::atomic<uint32_t> published_{0};                       // counts loops; helpers sleep on it
  std::atomic<bool> hiring_{false};
};

// Never destroyed: helpers look at it until the process ends.
std::atomic<Pool*> current{new Pool};

// A forked child has none of the helpers, so it starts with a pool of its own.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { current = new Pool; });

}  // namespace

bool is_inside_loop() { return inside; }

void run_loop(int64_t count, int64_t threads, LoopBody body) {
  threads = std::min({threads, count, kMostThreads});
  if (threads <= 1 || inside) return Pool::run_alone(count, body);
  current.load(std::memory_order_acquire)->run(count, threads, body);
}

}  // namespace adacomcat
