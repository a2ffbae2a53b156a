#include "emulator/bulk_copies.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/check.hpp"
#include "emulator/block.hpp"
#include "emulator/control.hpp"

namespace deep_a2a::emulator {
namespace {

constexpr uint32_t kUnit = 16;
constexpr uint32_t kLazyStepOneIn = 16;

void check_copy(const char* operation, const Block& block, const SharedMemory& shared, const void* shared_side,
                const void* global_side, uint32_t bytes) {
  if (bytes == 0 || bytes % kUnit != 0) {
    throw KernelError(text(operation, ": bytes is ", bytes, ", expected a multiple of ", kUnit));
  }
  if (reinterpret_cast<uintptr_t>(global_side) % kUnit != 0 || global_side == nullptr) {
    throw KernelError(text(operation, ": the global address is ", global_side, ", expected a multiple of ", kUnit));
  }
  if (reinterpret_cast<uintptr_t>(shared_side) % kUnit != 0) {
    throw KernelError(text(operation, ": the shared address is ", shared_side, ", expected a multiple of ", kUnit));
  }
  if (!shared.contains(shared_side, bytes)) {
    throw KernelError(text(operation, ": ", bytes, " bytes at ", shared_side, ", which is offset ",
                           static_cast<const char*>(shared_side) - shared.data(), " of the ", shared.bytes(),
                           " bytes of shared memory of ", block.where()));
  }
}

void forget_complete(BulkGroups& stores) {
  stores.groups.remove_if([&](const BulkGroup& group) { return &group != stores.open && group.unwritten == 0; });
}

}  // namespace

// Some launches have fast copies, others slow ones.
BulkCopies::BulkCopies(Random& random)
    : random_(random), step_every_(1u << random.below(6)), lazy_one_in_(1u << random.below(5)) {}

BulkCopies::~BulkCopies() = default;

void BulkCopies::load(Thread& thread, char* to_shared, const char* from_global, uint32_t bytes, uint64_t* barrier) {
  Block& block = *thread.block;
  check_copy("bulk_load", block, block.shared(), to_shared, from_global, bytes);
  block.mbarriers().add_load(barrier);
  Copy copy{&block, to_shared, from_global, bytes};
  copy.barrier = barrier;
  add(std::move(copy));
}

void BulkCopies::store(Thread& thread, char* to_global, const char* from_shared, uint32_t bytes) {
  Block& block = *thread.block;
  check_copy("bulk_store", block, block.shared(), from_shared, to_global, bytes);
  BulkGroups& stores = thread.stores;
  if (stores.open == nullptr) {
    stores.groups.push_back({stores.num_committed + 1});
    stores.open = &stores.groups.back();
    stores.last_used = stores.open->number;
  }
  ++stores.open->unread;
  ++stores.open->unwritten;
  Copy copy{&block, to_global, from_shared, bytes};
  copy.group = stores.open;
  add(std::move(copy));
}

// A group may be empty.
void BulkCopies::commit(Thread& thread) {
  thread.stores.open = nullptr;
  ++thread.stores.num_committed;
}

bool BulkCopies::have_read(Thread& thread, int num_pending) {
  BulkGroups& stores = thread.stores;
  forget_complete(stores);
  const uint64_t begin = stores.num_committed - std::min<uint64_t>(num_pending, stores.num_committed);
  return std::all_of(stores.groups.begin(), stores.groups.end(),
                     [&](const BulkGroup& group) { return group.number > begin || group.unread == 0; });
}

bool BulkCopies::are_complete(Thread& thread, int num_pending) {
  BulkGroups& stores = thread.stores;
  const uint64_t begin = stores.num_committed - std::min<uint64_t>(num_pending, stores.num_committed);
  const bool complete = std::all_of(stores.groups.begin(), stores.groups.end(), [&](const BulkGroup& group) {
    return group.number > begin || group.unwritten == 0;
  });
  if (complete) stores.num_waited = std::max(stores.num_waited, begin);
  forget_complete(stores);
  return complete;
}

void BulkCopies::add(Copy copy) {
  const uint32_t wanted = 1u << random_.below(3);
  copy.piece_bytes = (copy.bytes / wanted + kUnit - 1) / kUnit * kUnit;
  copy.num_pieces = static_cast<int>((copy.bytes + copy.piece_bytes - 1) / copy.piece_bytes);
  copy.unread = copy.unwritten = copy.num_pieces;
  copy.lazy = random_.once_in(lazy_one_in_);
  copy.buffer.reset(new char[copy.bytes]);
  copies_.push_back(std::make_unique<Copy>(std::move(copy)));
}

void BulkCopies::advance() {
  const size_t steps = 1 + random_.below(1 + static_cast<uint32_t>(copies_.size() / 4));
  for (size_t i = 0; i < steps && !copies_.empty(); ++i) step(random_.below(static_cast<uint32_t>(copies_.size())));
}

void BulkCopies::advance_at_times() {
  if (copies_.empty() || !random_.once_in(step_every_)) return;
  const size_t idx = random_.below(static_cast<uint32_t>(copies_.size()));
  if (!copies_[idx]->lazy || random_.once_in(kLazyStepOneIn)) step(idx);
}

void BulkCopies::step(size_t idx) {
  Copy& copy = *copies_[idx];
  const bool reads = copy.unread > 0 && (copy.unread == copy.unwritten || random_.once_in(2));
  int piece = static_cast<int>(random_.below(static_cast<uint32_t>(copy.num_pieces)));
  const PieceState wanted = reads ? PieceState::kUnread : PieceState::kRead;
  while (copy.pieces[piece] != wanted) piece = (piece + 1) % copy.num_pieces;
  if (reads) {
    read(copy, piece);
  } else {
    write(copy, piece);
  }
  if (copy.unwritten > 0) return;
  std::swap(copies_[idx], copies_.back());
  copies_.pop_back();
}

void BulkCopies::read(Copy& copy, int piece) {
  const uint32_t offset = static_cast<uint32_t>(piece) * copy.piece_bytes;
  memcpy(copy.buffer.get() + offset, copy.from + offset, std::min(copy.piece_bytes, copy.bytes - offset));
  copy.pieces[piece] = PieceState::kRead;
  if (--copy.unread == 0 && copy.group != nullptr) --copy.group->unread;
}

void BulkCopies::write(Copy& copy, int piece) {
  const uint32_t offset = static_cast<uint32_t>(piece) * copy.piece_bytes;
  const uint32_t bytes = std::min(copy.piece_bytes, copy.bytes - offset);
  memcpy(copy.to + offset, copy.buffer.get() + offset, bytes);
  copy.pieces[piece] = PieceState::kWritten;
  --copy.unwritten;
  if (copy.barrier != nullptr) copy.block->mbarriers().complete_bytes(copy.barrier, bytes);
  if (copy.group != nullptr && copy.unwritten == 0) --copy.group->unwritten;
}

void BulkCopies::check_exit(const Thread& thread) const {
  const BulkGroups& stores = thread.stores;
  if (stores.open != nullptr) throw KernelError("exits with bulk stores that it has not committed");
  if (stores.last_used > stores.num_waited) throw KernelError("exits with bulk stores whose bulk_wait has not come");
}

void BulkCopies::check_end(const Block& block) const {
  for (const auto& copy : copies_) {
    if (copy->block != &block) continue;
    throw KernelError(text(block.where(), ": ended while a bulk load of ", copy->bytes, " bytes to offset ",
                           block.shared().offset_of(copy->to), " of its shared memory was under way"));
  }
}

}  // namespace deep_a2a::emulator
