// A block of a CUDA grid on the host. Its threads are fibers, each of which runs until it waits for others;
// what it then finds depends on no order but that of the barriers. To show where a kernel depends on more,
// the orders in which threads, warps and blocks are taken can be chosen (FLATKERN_EMULATION_ORDER).
// Shared memory sized by the launch starts as NaNs and ends where it ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace emulation {

struct Extent {
  unsigned x, y, z;
  Extent(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that runs now.
struct Place {
  Extent thread, block, threads, grid;
};
extern Place place;
extern thread_local int last_error;

// Where in the source a thread waits.
struct Site {
  const char* file;
  int line;
};

bool allow_shared(void (*kernel)(), int bytes);
void run_grid(void (*kernel)(), Extent grid, unsigned threads, std::size_t shared_bytes,
              const std::function<void()>& thread);
void* dynamic_shared();

void block_barrier(Site site);
bool block_vote(Site site, bool value, bool all);
void warp_barrier(Site site);
// Leaves this lane's word, waits for the others', and takes that of lane `source`.
void exchange(Site site, unsigned mask, const void* mine, std::size_t bytes, int source, void* theirs);
unsigned ballot(Site site, unsigned mask, bool value);

template <typename T>
T from_lane(Site site, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  T theirs;
  exchange(site, mask, &value, sizeof(T), source, &theirs);
  return theirs;
}

inline int lane() {
  return static_cast<int>(place.thread.x % 32);
}

template <typename T>
T shuffle(Site site, unsigned mask, T value, int source, int width = 32) {
  return from_lane(site, mask, value, lane() / width * width + source % width);
}

template <typename T>
T shuffle_xor(Site site, unsigned mask, T value, int bits, int width = 32) {
  const int source = lane() ^ bits;
  return from_lane(site, mask, value, source / width > lane() / width ? lane() : source);
}

template <typename T>
T shuffle_down(Site site, unsigned mask, T value, int by, int width = 32) {
  const int source = lane() + by;
  return from_lane(site, mask, value, source / width == lane() / width ? source : lane());
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Extent grid, unsigned threads, std::size_t shared_bytes,
            const Arguments&... arguments) {
  run_grid(reinterpret_cast<void (*)()>(kernel), grid, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace emulation
