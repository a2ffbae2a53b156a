#include "emulator/mbarriers.hpp"

#include "common/check.hpp"
#include "emulator/control.hpp"
#include "emulator/launch.hpp"

namespace deep_a2a::emulator {
namespace {

// No word that a kernel would write by accident.
uint64_t marker_of(const uint64_t* word) { return reinterpret_cast<uintptr_t>(word) ^ 0x6D62617272696572u; }

}  // namespace

void Mbarriers::init(uint64_t* word, uint32_t arrivals) {
  if (!shared_.contains(word, sizeof *word) || reinterpret_cast<uintptr_t>(word) % sizeof *word != 0) {
    throw KernelError(
        text("mbarrier_init: barrier is ", word, ", expected 8 aligned bytes of the block's dynamic shared memory"));
  }
  if (arrivals == 0 || arrivals > kMostMbarrierCount) {
    throw KernelError(text("mbarrier_init: arrivals is ", arrivals, ", expected 1 to ", kMostMbarrierCount));
  }
  const auto known = barriers_.find(word);
  if (known != barriers_.end() && *word == marker_of(word)) {
    throw KernelError(
        text("mbarrier_init: the barrier at offset ", shared_.offset_of(word), " is initialised already"));
  }
  barriers_[word] = {arrivals, arrivals};
  *word = marker_of(word);
}

Mbarriers::Mbarrier& Mbarriers::find(uint64_t* word, const char* operation) {
  const auto known = barriers_.find(word);
  if (known == barriers_.end()) {
    throw KernelError(text(operation, ": the barrier at ", word, ", offset ",
                           static_cast<int32_t>(shared_.offset_of(word)),
                           " of the block's shared memory, is not initialised"));
  }
  if (*word == marker_of(word)) return known->second;
  throw KernelError(text(operation, ": the barrier at offset ", shared_.offset_of(word), " has been overwritten"));
}

void Mbarriers::finish_phase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  barrier.loads_unseen += barrier.loads_of_phase;
  barrier.loads_of_phase = 0;
  launch_.wake(barrier.watchers);
}

void Mbarriers::add_bytes(Mbarrier& barrier, int64_t bytes, const char* operation) {
  barrier.bytes += bytes;
  if (barrier.bytes >= -kMostMbarrierCount && barrier.bytes <= kMostMbarrierCount) return;
  throw KernelError(text(operation, ": the barrier's pending bytes become ", barrier.bytes, ", the limit is ",
                         kMostMbarrierCount, " either way"));
}

void Mbarriers::arrive(uint64_t* word) { arrive_expect(word, 0); }

void Mbarriers::arrive_expect(uint64_t* word, uint32_t bytes) {
  Mbarrier& barrier = find(word, "mbarrier_arrive");
  add_bytes(barrier, bytes, "mbarrier_arrive_expect_tx");
  if (barrier.pending == 0) {
    throw KernelError(text("mbarrier_arrive: the barrier at offset ", shared_.offset_of(word), " has all ",
                           barrier.arrivals, " arrivals of phase ", barrier.phase, " and waits for ", barrier.bytes,
                           " bytes"));
  }
  --barrier.pending;
  finish_phase(barrier);
}

bool Mbarriers::test(uint64_t* word, uint32_t parity) {
  const Mbarrier& barrier = find(word, "mbarrier_try_wait");
  if (parity > 1) throw KernelError(text("mbarrier_try_wait: parity is ", parity, ", expected 0 or 1"));
  return (barrier.phase & 1) != parity;
}

void Mbarriers::watch(uint64_t* word) { launch_.watch(find(word, "mbarrier_try_wait").watchers); }

void Mbarriers::add_load(uint64_t* word) { ++find(word, "bulk_load").loads_of_phase; }

void Mbarriers::complete_bytes(uint64_t* word, uint32_t bytes) {
  Mbarrier& barrier = find(word, "bulk_load");
  add_bytes(barrier, -int64_t{bytes}, "bulk_load");
  finish_phase(barrier);
}

std::string Mbarriers::objection_at_end() const {
  for (const auto& [word, barrier] : barriers_) {
    const int loads = barrier.loads_of_phase + barrier.loads_unseen;
    if (loads == 0 && barrier.bytes == 0) continue;
    return text("the kernel ended with ", loads, " bulk loads that nobody has seen complete and ", barrier.bytes,
                " pending bytes at the mbarrier of offset ", shared_.offset_of(word));
  }
  return "";
}

std::string Mbarriers::describe() const {
  std::string all;
  for (const auto& [word, barrier] : barriers_) {
    if (barrier.pending == barrier.arrivals && barrier.bytes == 0) continue;
    all += text("; mbarrier at offset ", shared_.offset_of(word), " in phase ", barrier.phase, " waits for ",
                barrier.pending, " of ", barrier.arrivals, " arrivals and ", barrier.bytes, " bytes");
  }
  return all;
}

}  // namespace deep_a2a::emulator
