#include "block.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

Place place;
thread_local int last_error = 0;

namespace {

constexpr unsigned kMostThreads = 1024, kMostRows = 65535, kLanes = 32;
constexpr int kSharedByDefault = 48 << 10, kMostShared = 227 << 10;  // of compute capability 9.0
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kStack = 256 << 10;
#else
constexpr std::size_t kStack = 64 << 10;
#endif

// Threads in turn or from the last; or a warp as far as it gets before the next, from the first or the last.
enum class Order { forward, backward, warp_by_warp, warp_by_warp_backward };

Order order_of(const char* name) {
  const std::string wanted = name ? name : "forward";
  if (wanted == "backward") return Order::backward;
  if (wanted == "warp-by-warp") return Order::warp_by_warp;
  if (wanted == "warp-by-warp-backward") return Order::warp_by_warp_backward;
  if (wanted == "forward") return Order::forward;
  std::fprintf(stderr, "FLATKERN_EMULATION_ORDER=%s is not an order\n", name);
  std::abort();
}

const Order order = order_of(std::getenv("FLATKERN_EMULATION_ORDER"));

enum class State { ready, at_warp, at_block, done };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  State state = State::done;
  Site site = {"", 0};
  bool begun = false;
  void* here[5];
  void* fake_stack = nullptr;
};

struct Warp {
  unsigned arrived = 0;
  int turn = 0;  // exchanges alternate between two sets of words: the others may not have read theirs yet
  std::uint64_t words[2][kLanes];
};

// One block at a time, whoever asks.
struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  unsigned threads = 0, arrived = 0, current = 0;
  int turn = 0;
  bool all[2], any[2];
  const std::function<void()>* thread = nullptr;
  std::unique_ptr<unsigned char[]> shared;
  void* scheduler[5];
  void* fake_stack = nullptr;
  const void* bottom = nullptr;  // of the stack that the scheduler is on
  std::size_t size = 0;
};

Machine machine;
std::mutex one_grid;
std::map<void (*)(), int> allowed_shared;

[[noreturn]] void give_up(const char* why) {
  std::fprintf(stderr, "emulated CUDA: %s; block (%u, %u)\n", why, place.block.x, place.block.y);
  for (unsigned i = 0; i < machine.threads; ++i) {
    const Fiber& f = *machine.fibers[i];
    const char* state = f.state == State::done       ? "has ended"
                        : f.state == State::at_warp  ? "waits for its warp at"
                        : f.state == State::at_block ? "waits for the block at"
                                                     : "runs";
    std::fprintf(stderr, "  thread %u %s %s:%d\n", i, state, f.site.file, f.site.line);
  }
  std::abort();
}

// AddressSanitizer is told of every change of stacks.
#ifdef __SANITIZE_ADDRESS__
void leaving(void** keep, const void* bottom, std::size_t size) {
  __sanitizer_start_switch_fiber(keep, bottom, size);
}
void arrived(void* kept, const void** bottom, std::size_t* size) {
  __sanitizer_finish_switch_fiber(kept, bottom, size);
}
#else
void leaving(void**, const void*, std::size_t) {}
void arrived(void*, const void**, std::size_t*) {}
#endif

// The compiler's own jumps: swapcontext asks the kernel for the signal mask at every switch, and under
// AddressSanitizer both it and longjmp go through the whole stack.
__attribute__((noinline, no_sanitize("address"))) void jump(void** to) {
  __builtin_longjmp(to, 1);
}

__attribute__((noinline, no_sanitize("address"))) void enter(Fiber& f) {
  leaving(&machine.fake_stack, f.stack.get(), kStack);
  if (__builtin_setjmp(machine.scheduler) == 0) {
    if (f.begun) jump(f.here);
    f.begun = true;
    setcontext(&f.start);
  }
  arrived(machine.fake_stack, nullptr, nullptr);
}

__attribute__((noinline, no_sanitize("address"))) void leave(Fiber& f) {
  leaving(&f.fake_stack, machine.bottom, machine.size);
  if (__builtin_setjmp(f.here) == 0) jump(machine.scheduler);
  arrived(f.fake_stack, &machine.bottom, &machine.size);
}

void begin() {
  arrived(nullptr, &machine.bottom, &machine.size);
}

// A fiber lives on from block to block.
void fiber_main() {
  begin();
  for (;;) {
    Fiber& f = *machine.fibers[machine.current];
    (*machine.thread)();
    f.state = State::done;
    leave(f);
  }
}

void add_fibers(unsigned threads) {
  while (machine.fibers.size() < threads) {
    auto f = std::make_unique<Fiber>();
    getcontext(&f->start);
    f->start.uc_stack.ss_sp = f->stack.get();
    f->start.uc_stack.ss_size = kStack;
    f->start.uc_link = nullptr;
    makecontext(&f->start, fiber_main, 0);
    machine.fibers.push_back(std::move(f));
  }
}

void wait(State state, Site site) {
  Fiber& f = *machine.fibers[machine.current];
  f.state = state;
  f.site = site;
  leave(f);
}

bool same(Site a, Site b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

// Lets threads [begin, end) go on that have all come to one place.
void release(unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i) {
    if (!same(machine.fibers[i]->site, machine.fibers[begin]->site)) {
      give_up("threads meet at different barriers");
    }
  }
  for (unsigned i = begin; i < end; ++i) machine.fibers[i]->state = State::ready;
}

void arrive_at_warp(Site site) {
  const unsigned w = machine.current / kLanes;
  Warp& warp = machine.warps[w];
  Fiber& f = *machine.fibers[machine.current];
  f.site = site;
  if (++warp.arrived < kLanes) return wait(State::at_warp, site);
  warp.arrived = 0;
  warp.turn ^= 1;
  release(w * kLanes, (w + 1) * kLanes);
}

void arrive_at_block(Site site, bool value) {
  Machine& m = machine;
  m.all[m.turn] = m.all[m.turn] && value;
  m.any[m.turn] = m.any[m.turn] || value;
  m.fibers[m.current]->site = site;
  if (++m.arrived < m.threads) return wait(State::at_block, site);
  m.arrived = 0;
  m.turn ^= 1;
  m.all[m.turn] = true, m.any[m.turn] = false;  // everybody has read the vote before the last one
  release(0, m.threads);
}

bool step(unsigned i) {
  Fiber& f = *machine.fibers[i];
  if (f.state != State::ready) return false;
  machine.current = i;
  place.thread = Extent(i, 0, 0);
  enter(f);
  return true;
}

void run_block() {
  const unsigned threads = machine.threads, warps = threads / kLanes;
  const bool backward = order == Order::backward || order == Order::warp_by_warp_backward;
  const bool by_warps = order == Order::warp_by_warp || order == Order::warp_by_warp_backward;
  machine.arrived = 0;
  machine.turn = 0;
  machine.all[0] = true, machine.any[0] = false;
  machine.warps.assign(warps, Warp());
  for (unsigned i = 0; i < threads; ++i) {
    machine.fibers[i]->state = State::ready;
    machine.fibers[i]->site = {"", 0};
  }
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned k = 0; k < warps; ++k) {
      const unsigned w = backward ? warps - 1 - k : k;
      for (bool here = true; here;) {
        here = false;
        for (unsigned l = 0; l < kLanes; ++l) {
          here = step(w * kLanes + (backward ? kLanes - 1 - l : l)) || here;
        }
        moved = moved || here;
        here = here && by_warps;
      }
    }
  }
  for (unsigned i = 0; i < threads; ++i) {
    if (machine.fibers[i]->state != State::done) give_up("threads wait for others that never come");
  }
}

}  // namespace

bool allow_shared(void (*kernel)(), int bytes) {
  const std::lock_guard<std::mutex> lock(one_grid);
  if (bytes > kMostShared) return false;
  allowed_shared[kernel] = bytes;
  return true;
}

void run_grid(void (*kernel)(), Extent grid, unsigned threads, std::size_t shared_bytes,
              const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_grid);
  const auto found = allowed_shared.find(kernel);
  const int allowed = found == allowed_shared.end() ? kSharedByDefault : found->second;
  const bool possible = threads > 0 && threads <= kMostThreads && threads % kLanes == 0 && grid.x > 0 &&
                        grid.x < 1u << 31 && grid.y > 0 && grid.y <= kMostRows && grid.z == 1;
  if (!possible || shared_bytes > static_cast<std::size_t>(allowed)) {
    last_error = possible ? 1 : 9;
    return;
  }
  add_fibers(threads);
  machine.threads = threads;
  machine.thread = &thread;
  machine.shared.reset(new unsigned char[shared_bytes]);
  place = {Extent(0, 0, 0), Extent(0, 0, 0), Extent(threads), grid};
  const bool backward = order == Order::backward || order == Order::warp_by_warp_backward;
  const std::uint64_t blocks = static_cast<std::uint64_t>(grid.x) * grid.y;
  for (std::uint64_t k = 0; k < blocks; ++k) {
    const std::uint64_t b = backward ? blocks - 1 - k : k;
    place.block = Extent(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x), 0);
    std::memset(machine.shared.get(), 0xff, shared_bytes);
    run_block();
  }
}

void* dynamic_shared() {
  return machine.shared.get();
}

void block_barrier(Site site) {
  arrive_at_block(site, true);
}

bool block_vote(Site site, bool value, bool all) {
  const int turn = machine.turn;
  arrive_at_block(site, value);
  return all ? machine.all[turn] : machine.any[turn];
}

void warp_barrier(Site site) {
  arrive_at_warp(site);
}

void exchange(Site site, unsigned mask, const void* mine, std::size_t bytes, int source, void* theirs) {
  if (mask != 0xffffffffu) give_up("only exchanges of whole warps are known here");
  Warp& warp = machine.warps[machine.current / kLanes];
  const int turn = warp.turn;
  std::memcpy(&warp.words[turn][machine.current % kLanes], mine, bytes);
  arrive_at_warp(site);
  std::memcpy(theirs, &warp.words[turn][source], bytes);
}

unsigned ballot(Site site, unsigned mask, bool value) {
  if (mask != 0xffffffffu) give_up("only votes of whole warps are known here");
  Warp& warp = machine.warps[machine.current / kLanes];
  const int turn = warp.turn;
  warp.words[turn][machine.current % kLanes] = value;
  arrive_at_warp(site);
  unsigned votes = 0;
  for (unsigned l = 0; l < kLanes; ++l) votes |= static_cast<unsigned>(warp.words[turn][l] & 1) << l;
  return votes;
}

}  // namespace emulation
