#include "emulator/device_memory.hpp"

#include <cstring>

#include "common/check.hpp"
#include "emulator/control.hpp"
#include "emulator/launch.hpp"

namespace deep_a2a::emulator {
namespace {

constexpr uint32_t kFalseOneIn = 8;

Mbarriers& mbarriers() { return Launch::self().block->mbarriers(); }

}  // namespace

char* dynamic_shared() { return Launch::self().block->shared().data(); }

uint32_t shared_offset(const void* pointer) {
  const Block& block = *Launch::self().block;
  if (!block.shared().contains(pointer, 0)) {
    throw KernelError(text("shared_address: ", pointer, " is not in the dynamic shared memory of ", block.where()));
  }
  return block.shared().offset_of(pointer);
}

void before_relaxed_load(const void* address) {
  Thread& self = Launch::self();
  if (self.last_loaded == address) {
    yield_outside();
  } else {
    maybe_preempt();
  }
  self.last_loaded = address;
}

void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  Launch::current().preempt();
  mbarriers().init(barrier, arrivals);
}

void mbarrier_arrive(uint64_t* barrier) {
  Launch::current().preempt();
  mbarriers().arrive(barrier);
}

void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  Launch::current().preempt();
  mbarriers().arrive_expect(barrier, bytes);
}

bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  Launch& launch = Launch::current();
  const bool is_over = mbarriers().test(barrier, parity);
  if (launch.random().once_in(kFalseOneIn)) {
    launch.poll(Poll::kLocal);
    return false;
  }
  if (is_over) {
    mbarriers().note_seen(barrier);
    launch.note_progress();
    return true;
  }
  mbarriers().watch(barrier);
  return false;
}

void bulk_load(void* to_shared, const void* from_global, uint32_t bytes, uint64_t* barrier) {
  Launch& launch = Launch::current();
  launch.preempt();
  launch.copies().load(Launch::self(), static_cast<char*>(to_shared), static_cast<const char*>(from_global), bytes,
                       barrier);
}

void bulk_store(void* to_global, const void* from_shared, uint32_t bytes) {
  Launch& launch = Launch::current();
  launch.preempt();
  launch.copies().store(Launch::self(), static_cast<char*>(to_global), static_cast<const char*>(from_shared), bytes);
}

void bulk_commit() {
  Launch& launch = Launch::current();
  launch.preempt();
  launch.copies().commit(Launch::self());
}

void bulk_wait_read(int num_pending) {
  Launch& launch = Launch::current();
  while (!launch.copies().have_read(Launch::self(), num_pending)) launch.poll(Poll::kLocal);
  launch.note_progress();
}

void bulk_wait(int num_pending) {
  Launch& launch = Launch::current();
  while (!launch.copies().are_complete(Launch::self(), num_pending)) launch.poll(Poll::kLocal);
  launch.note_progress();
}

void async_load(void* to_shared, const void* from_global, uint32_t bytes) {
  Launch& launch = Launch::current();
  launch.preempt();
  Thread& self = Launch::self();
  if (!self.block->shared().contains(to_shared, bytes)) {
    throw KernelError(text("async_load: ", bytes, " bytes at ", to_shared, ", which is not in the shared memory of ",
                           self.block->where()));
  }
  if ((reinterpret_cast<uintptr_t>(to_shared) | reinterpret_cast<uintptr_t>(from_global)) % bytes != 0) {
    throw KernelError(
        text("async_load: addresses are ", to_shared, " and ", from_global, ", expected multiples of ", bytes));
  }
  const bool at_once = launch.random().once_in(2);
  if (at_once) memcpy(to_shared, from_global, bytes);
  self.async_loads.push_back({to_shared, from_global, bytes, at_once});
}

void async_wait() {
  Launch& launch = Launch::current();
  launch.preempt();
  std::vector<AsyncLoad>& loads = Launch::self().async_loads;
  while (!loads.empty()) {
    AsyncLoad& load = loads[launch.random().below(static_cast<uint32_t>(loads.size()))];
    if (!load.is_there) memcpy(load.to, load.from, load.bytes);
    load = loads.back();
    loads.pop_back();
  }
}

void sync_named(int barrier_idx, unsigned num_threads) {
  Thread& self = Launch::self();
  self.block->barriers().sync_named(self, barrier_idx, num_threads);
}

uint64_t global_timer() {
  Launch::current().note_outside();
  return clock_ns();
}

}  // namespace deep_a2a::emulator
