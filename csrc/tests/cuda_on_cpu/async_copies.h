// Asynchronous copies to shared memory, by the names of csrc/cuda/ptx.cuh: PTX ISA, "Data Movement and Conversion
// Instructions: cp.async". Memory is dynamic shared memory alone.
//
// A copy may complete at any time until its thread waits for it. The schedule's seed selects the time: with seeds 0, 3,
// 6, ... as late as possible, with 1, 4, ... at once, with 2, 5, ... sometimes early. Until a copy completes its
// destination holds NaN. Errors, each with the operation's name: copies that are misaligned, to memory that is not
// shared, or over a copy that no thread has waited for; and loads (matrix.h) of memory whose copy was not waited for,
// even if it completed at once. For ThreadSanitizer a copy is a write of its thread, when it is issued and when it
// completes.
#pragma once

#include <deque>

#include "cuda_on_cpu/sectors.h"

namespace cuda_on_cpu {

class AsyncCopies {
 public:
  struct Copy {
    char* to;
    const void* from;  // null: zeros
    bool done;
    uint64_t group;
  };

  // Returns whether the copy is to complete at once.
  bool issue(char* to, const void* from, const Place& place) {
    const IgnoreAccesses ignore;
    if (block_ != device.blocks_run) begin_block();
    if (to < device.dynamic_shared || to + kBytes > device.dynamic_shared + device.dynamic_bytes)
      fail_here("an asynchronous copy to what is not dynamic shared memory", place);
    if (reinterpret_cast<uintptr_t>(to) % kBytes) fail_here("an asynchronous copy to a misaligned address", place);
    int& owner = pending_[size_t(to - device.dynamic_shared) / kBytes];
    if (owner >= 0) fail_here("an asynchronous copy over another that was not waited for", place);
    owner = device.current;
    const bool at_once = device.seed % 3 == 1 || (device.seed % 3 == 2 && random_below(2));
    Queue& queue = mine();
    queue.copies.push_back({to, from, at_once, queue.groups});
    return at_once;
  }
  void commit() {
    const IgnoreAccesses ignore;
    if (block_ != device.blocks_run) begin_block();
    mine().groups++;
  }
  // Takes the next copy that must be complete if at most `incomplete` groups may not be; returns false if there is
  // none.
  bool take(uint64_t incomplete, Copy& copy) {
    const IgnoreAccesses ignore;
    if (block_ != device.blocks_run) begin_block();
    Queue& queue = mine();
    if (queue.copies.empty() || queue.copies.front().group + incomplete >= queue.groups) return false;
    copy = queue.copies.front();
    queue.copies.pop_front();
    pending_[size_t(copy.to - device.dynamic_shared) / kBytes] = -1;
    return true;
  }
  // Before a load of 16 bytes of shared memory.
  void check_load(const char* name, const char* from, const Place& place) const {
    const IgnoreAccesses ignore;
    if (from < device.dynamic_shared || from + kBytes > device.dynamic_shared + device.dynamic_bytes)
      fail_here(std::string(name) + " of what is not dynamic shared memory", place);
    if (reinterpret_cast<uintptr_t>(from) % kBytes) fail_here(std::string(name) + " of a misaligned address", place);
    if (block_ != device.blocks_run) return;
    const int owner = pending_[size_t(from - device.dynamic_shared) / kBytes];
#if defined(__SANITIZE_THREAD__)
    const bool found = owner == device.current;  // another thread's copy is a race, which is reported as a race
#else
    const bool found = owner >= 0;
#endif
    if (found) fail_here(std::string(name) + " of memory whose asynchronous copy was not waited for", place);
  }

  static constexpr size_t kBytes = 16;

 private:
  struct Queue {
    std::deque<Copy> copies;
    uint64_t groups = 0;  // number of committed groups
  };
  Queue& mine() { return queues_[size_t(device.current)]; }
  void begin_block() {
    block_ = device.blocks_run;
    queues_.assign(size_t(device.block_threads), Queue{});
    pending_.assign(device.dynamic_bytes / kBytes + 1, -1);
  }

  uint64_t block_ = 0;
  std::vector<Queue> queues_;  // one for each thread
  std::vector<int> pending_;   // for each 16 bytes the thread that has not waited for its copy, or -1
};
inline AsyncCopies async_copies;

}  // namespace cuda_on_cpu

namespace ptx {

using Shared = char*;
inline Shared shared_address(void* address) { return static_cast<char*>(address); }

inline void copy_async(Shared to, const void* from, bool exists,
                       cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  if (exists) cuda_on_cpu::check_access(static_cast<const uint4*>(from), false, place);
  if (!cuda_on_cpu::async_copies.issue(to, exists ? from : nullptr, place))
    std::memset(to, 0xff, 16);
  else if (exists)
    std::memcpy(to, from, 16);
  else
    std::memset(to, 0, 16);
}
inline void commit_copies() { cuda_on_cpu::async_copies.commit(); }
template <int kPending>
void wait_for_copies() {
  cuda_on_cpu::AsyncCopies::Copy copy;
  while (cuda_on_cpu::async_copies.take(kPending, copy)) {
    if (copy.done) continue;
    if (copy.from)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
}

}  // namespace ptx
