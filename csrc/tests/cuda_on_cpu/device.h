// The device: blocks, their threads, the scheduler, and launches.
#pragma once

#include <algorithm>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_on_cpu/fibers.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

using Place = std::source_location;

struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline constexpr int kWarp = 32;
// CUDA C++ Programming Guide, "Compute Capabilities". Shared memory of a block: the minimum from 8.0 to 12.0, which is
// that of 12.0.
inline constexpr size_t kMaxThreads = 1024, kMaxShared = 99 << 10;
// 48 KiB, less the static shared memory that a kernel with dynamic shared memory may have
inline constexpr size_t kSharedUnasked = 47 << 10;

enum class Wait : uint8_t { none, block, warp, done };

struct Thread {
  Wait wait = Wait::none;
  const char* operation = "";  // operation of a warp
  unsigned mask = 0;
  uint64_t value = 0, result = 0;  // its argument and result of the operation
  int source = 0;                  // the lane that a shuffle reads
  unsigned barriers = 0;           // number passed, of the block
  unsigned collectives = 0;        // number passed, of block or warp
  unsigned meeting = 0;            // the number of the last warp operation
  char event = 0;                  // its address identifies the thread's arrival at a __syncwarp
  Fiber* fiber = nullptr;
  Place place;
  unsigned line = 0;  // place.line()
  uint3 index{};      // threadIdx
};

struct Device {
  uint64_t seed = 0, random = 0;
  bool running = false;
  const char* kernel = "";
  dim3 grid, block;
  uint3 thread_index{}, block_index{};
  Thread threads[kMaxThreads];  // block_threads of them
  int runnable[kMaxThreads];    // runnable_count of them
  int block_threads = 0, runnable_count = 0, current = 0, alive = 0, arrived = 0;
  const std::function<void()>* body = nullptr;
  bool failed = false;
  std::string error;  // if an error occurred

  Fiber scheduler;
  std::vector<Fiber*> all_fibers;
  Fiber* idle_fibers[kMaxThreads] = {};  // idle_count of them
  int idle_count = 0;
  uint64_t launches = 0;
  int driver_version = 13000;  // result of cudaDriverGetVersion
  int number = 3;              // result of cudaGetDevice; also its multiprocessors, with one resident block each
  uint64_t blocks_run = 0;     // in all launches: static shared memory is poisoned when it changes
  unsigned meetings = 0;
  char barrier_events[2] = {};
  char block_events[2] = {};       // order the threads of a block before those of the next
  char meeting_events[4096] = {};  // more than can exist at one time

  char* dynamic_shared = nullptr;
  size_t dynamic_bytes = 0;
  std::unordered_map<const void*, size_t> shared_allowed;  // by kernel: cudaFuncSetAttribute

  std::function<void()> block_done;  // for the sector counter
};
inline Device device;

inline void set_seed(uint64_t seed) { device.seed = seed; }

CUDA_ON_CPU_NO_TSAN inline unsigned random_below(unsigned limit) {  // xorshift64
  device.random ^= device.random << 13;
  device.random ^= device.random >> 7;
  device.random ^= device.random << 17;
  return unsigned((device.random >> 32) * limit >> 32);  // a division would take as long as the rest of a switch
}

// ---- failures

inline std::string describe_thread(int i) {
  const Thread& t = device.threads[i];
  std::string text = "thread " + std::to_string(i) + " of block " + std::to_string(device.block_index.x);
  if (t.wait == Wait::done) return text + " has exited";
  const char* what = t.wait == Wait::block ? " waits at __syncthreads" : t.wait == Wait::warp ? " waits at " : " is";
  text += what;
  if (t.wait == Wait::warp) text += t.operation;
  return text + " in " + t.place.file_name() + ":" + std::to_string(t.place.line());
}

inline void report_failure(const std::string& message) {
  if (!device.failed) device.error = std::string("kernel ") + device.kernel + ": " + message;
  device.failed = true;
}

// Ends the kernel from inside a thread, which stays suspended.
[[noreturn]] inline void fail_here(const std::string& message, const Place& place) {
  const IgnoreAccesses ignore;
  device.threads[device.current].place = place;
  report_failure(message + ": " + describe_thread(device.current));
  for (;;) switch_fiber(*device.threads[device.current].fiber, device.scheduler);
}

// ---- threads

CUDA_ON_CPU_NO_TSAN inline void yield() { switch_fiber(*device.threads[device.current].fiber, device.scheduler); }

CUDA_ON_CPU_NO_TSAN inline void make_runnable(int i) {
  device.threads[i].wait = Wait::none;
  device.runnable[device.runnable_count++] = i;
}

CUDA_ON_CPU_NO_TSAN inline void thread_main() {
  fiber_has_begun(device.scheduler);
  for (;;) {  // a fiber runs many threads, one after another
    happens_after(&device.block_events[(device.blocks_run + 1) % 2]);
    (*device.body)();
    happens_before(&device.block_events[device.blocks_run % 2]);
    Thread& thread = device.threads[device.current];
    thread.wait = Wait::done;
    device.alive--;
    switch_fiber(*thread.fiber, device.scheduler);
  }
}

CUDA_ON_CPU_NO_TSAN inline void resume(int i) {
  Thread& thread = device.threads[i];
  if (!thread.fiber) {
    if (device.idle_count == 0) {
      device.idle_fibers[device.idle_count++] = new_fiber(thread_main);
      device.all_fibers.push_back(device.idle_fibers[0]);
    }
    thread.fiber = device.idle_fibers[--device.idle_count];
  }
  device.current = i;
  device.thread_index = thread.index;
  switch_fiber(device.scheduler, *thread.fiber);
#if !defined(__SANITIZE_THREAD__)  // for ThreadSanitizer, a fiber is one thread of the block until the block ends
  if (thread.wait == Wait::done) device.idle_fibers[device.idle_count++] = thread.fiber;
#endif
}

// ---- barriers of the block

CUDA_ON_CPU_NO_TSAN inline void block_barrier(const Place& place) {
  Thread& thread = device.threads[device.current];
  thread.wait = Wait::block;
  thread.place = place;
  thread.line = place.line();
  thread.collectives++;
  device.arrived++;
  void* const event = &device.barrier_events[thread.barriers++ % 2];
  happens_before(event);
  yield();
  happens_after(event);
}

// Called when no thread can run: continues the block if all its threads wait at the same __syncthreads. Returns false
// if not.
CUDA_ON_CPU_NO_TSAN inline bool release_block_barrier() {
  if (!device.arrived || device.arrived != device.alive) return false;
  const int count = device.block_threads;
  int first = 0;
  while (device.threads[first].wait != Wait::block) first++;
  for (int i = 0; i < count; i++) {
    const Thread& t = device.threads[i];
    if (t.wait == Wait::block && t.line == device.threads[first].line) continue;
    report_failure("divergent __syncthreads: " + describe_thread(first) + ", but " + describe_thread(i));
    return false;
  }
  device.arrived = 0;
  for (int i = 0; i < count; i++) make_runnable(i);
  return true;
}

inline void report_deadlock() {
  std::string message = "deadlock";
  const auto& threads = device.threads;
  for (int i = 0, shown = 0; i < device.block_threads && shown < 6; i++) {
    if (i && threads[i].wait == threads[i - 1].wait && threads[i].line == threads[i - 1].line) continue;
    message += (shown++ ? ", " : ": ") + describe_thread(i);
  }
  report_failure(message);
}

// ---- operations of the warp

// A lane's part in an operation of the lanes in `mask`, before its result. Returns true for the last lane to arrive,
// which must compute every lane's result and call leave(). For the other lanes the result is then stored.
CUDA_ON_CPU_NO_TSAN inline bool arrive(const char* name, unsigned& mask, uint64_t value, int source, const Place& place,
                                       bool orders_memory) {
  const int me = device.current, first = me / kWarp * kWarp, lane = me - first;
  const int left = device.block_threads - first, lanes = left < kWarp ? left : kWarp;
  Thread* const warp = &device.threads[first];
  Thread& thread = warp[lane];
  if (lanes < kWarp && mask == ~0u) mask = (1u << lanes) - 1;  // the last warp of a block may be incomplete
  if (!(mask >> lane & 1)) fail_here(std::string("a lane that is not in its own mask, at ") + name, place);
  thread.wait = Wait::warp;
  thread.operation = name;
  thread.mask = mask;
  thread.value = value;
  thread.source = source;
  thread.place = place;
  thread.line = place.line();
  thread.collectives++;
  if (orders_memory) happens_before(&thread.event);

  bool complete = true;
  for (int l = 0; l < lanes && complete; l++) {
    if (!(mask >> l & 1)) continue;
    const Thread& other = warp[l];
    if (other.wait != Wait::warp || other.mask != mask)
      complete = false;
    else if ((other.operation != name && std::strcmp(other.operation, name)) || other.line != thread.line)
      fail_here("lanes of one mask in different operations, with " + describe_thread(first + l), place);
  }
  if (complete) return true;
  yield();
  if (orders_memory) happens_after(&device.meeting_events[thread.meeting]);
  return false;
}

// Called by the last lane after it has stored all results.
CUDA_ON_CPU_NO_TSAN inline void leave(unsigned mask, bool orders_memory) {
  const int me = device.current, first = me / kWarp * kWarp;
  Thread* const warp = &device.threads[first];
  const unsigned meeting = device.meetings++ % unsigned(sizeof device.meeting_events);
  for (int l = 0; l < kWarp && first + l < device.block_threads; l++) {
    if (!(mask >> l & 1)) continue;
    if (orders_memory) happens_after(&warp[l].event);
    warp[l].meeting = meeting;
    if (first + l != me) make_runnable(first + l);
  }
  if (orders_memory) happens_before(&device.meeting_events[meeting]);
  device.threads[me].wait = Wait::none;
}

// An operation of the lanes in `mask`: the last lane to arrive computes every lane's result by combine(the warp's
// threads, mask). Only __syncwarp orders memory.
template <class Combine>
CUDA_ON_CPU_NO_TSAN uint64_t warp_operation(const char* name, unsigned mask, uint64_t value, int source,
                                            const Place& place, bool orders_memory, Combine combine) {
  const IgnoreAccesses ignore;  // during combine
  if (arrive(name, mask, value, source, place, orders_memory)) {
    combine(&device.threads[device.current / kWarp * kWarp], mask);
    leave(mask, orders_memory);
  }
  return device.threads[device.current].result;
}

// ---- launches

CUDA_ON_CPU_NO_TSAN inline void run_block() {
  const size_t count = size_t(device.block.x) * device.block.y * device.block.z;
  device.blocks_run++;
  device.alive = int(count);
  device.arrived = 0;
  device.block_threads = int(count);
  device.runnable_count = 0;
  uint3 index{};
  for (int i = 0; i < int(count); i++) {
    device.threads[i] = Thread{};
    device.threads[i].index = index;
    device.runnable[device.runnable_count++] = int(count) - 1 - i;
    if (++index.x < device.block.x) continue;
    index.x = 0;
    if (++index.y < device.block.y) continue;
    index.y = 0;
    index.z++;
  }
  constexpr size_t kRedZone = 64;
  if (device.dynamic_bytes) {
    device.dynamic_shared =
        static_cast<char*>(std::aligned_alloc(64, (device.dynamic_bytes + kRedZone + 63) / 64 * 64));
    std::memset(device.dynamic_shared, 0xff, device.dynamic_bytes);  // as floats, NaN
    forbid_access(device.dynamic_shared + device.dynamic_bytes, kRedZone);
  }
  while (!device.failed) {
    if (device.runnable_count == 0) {
      if (device.alive == 0) break;
      if (!release_block_barrier()) report_deadlock();
      continue;
    }
    int& last = device.runnable[device.runnable_count - 1];
    const int chosen = device.random ? int(random_below(unsigned(device.runnable_count))) : device.runnable_count - 1;
    const int next = device.runnable[chosen];
    device.runnable[chosen] = last;
    device.runnable_count--;
    resume(next);
  }
#if defined(__SANITIZE_THREAD__)
  for (int i = 0; i < device.block_threads; i++)
    if (device.threads[i].wait == Wait::done) device.idle_fibers[device.idle_count++] = device.threads[i].fiber;
#endif
  if (device.dynamic_bytes) {
    allow_access(device.dynamic_shared, device.dynamic_bytes + kRedZone);
    std::free(device.dynamic_shared);
  }
  if (device.block_done) device.block_done();
}

// After a failure threads stay suspended. The host continues and may read the memory that they wrote.
inline void order_abandoned_threads() {
#if defined(__SANITIZE_THREAD__)
  for (Fiber* fiber : device.all_fibers) {
    __tsan_switch_to_fiber(fiber->tsan_fiber, 0);
    __tsan_switch_to_fiber(device.scheduler.tsan_fiber, 0);
  }
#endif
}

inline void check_launch(const void* kernel, const char* name) {
  const dim3 &g = device.grid, &b = device.block;
  const size_t threads = size_t(b.x) * b.y * b.z;
  const auto allowed = device.shared_allowed.find(kernel);
  const size_t shared =
      allowed == device.shared_allowed.end() ? kSharedUnasked : std::max(allowed->second, kSharedUnasked);
  const auto refuse = [&](const std::string& why) { throw KernelError(std::string("launch of ") + name + ": " + why); };
  if (threads == 0 || threads > kMaxThreads || b.z > 64) refuse(std::to_string(threads) + " threads in a block");
  if (!g.x || !g.y || !g.z || g.x > INT32_MAX || g.y > 65535 || g.z > 65535) refuse("a grid of impossible size");
  if (device.dynamic_bytes > std::min(shared, kMaxShared))
    refuse(std::to_string(device.dynamic_bytes) + " bytes of dynamic shared memory, " + std::to_string(shared) +
           " allowed");
}

inline void launch(const void* kernel, const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& body) {
  if (device.running) throw KernelError("a launch from inside a kernel");
  device.kernel = name;
  device.grid = grid;
  device.block = block;
  device.dynamic_bytes = shared_bytes;
  check_launch(kernel, name);
  device.launches++;
  device.body = &body;
  device.failed = false;
  device.random = device.seed * 0x9e3779b97f4a7c15u;
#if defined(__SANITIZE_THREAD__)
  device.scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
  const IgnoreAccesses ignore;
  device.running = true;
  happens_before(&device.block_events[device.blocks_run % 2]);  // the host's accesses precede the first block's
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; i++) order[i] = i;
  for (uint64_t i = blocks; device.random && i-- > 1;) std::swap(order[i], order[random_below(unsigned(i + 1))]);
  for (uint64_t number : order) {
    device.block_index = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                          unsigned(number / grid.x / grid.y)};
    run_block();
    if (device.failed) break;
  }
  happens_after(&device.block_events[device.blocks_run % 2]);
  device.running = false;
  if (!device.failed) return;
  order_abandoned_threads();
  throw KernelError(device.error);
}

}  // namespace cuda_on_cpu
