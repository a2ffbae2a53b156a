#include "emulator/block.hpp"

#include <map>

#include "common/check.hpp"
#include "emulator/control.hpp"
#include "emulator/launch.hpp"
#include "emulator/stack_pool.hpp"

namespace deep_a2a::emulator {
namespace {

uint3 unravel(uint64_t number, const dim3& shape) {
  return {static_cast<unsigned>(number % shape.x), static_cast<unsigned>(number / shape.x % shape.y),
          static_cast<unsigned>(number / shape.x / shape.y)};
}

}  // namespace

Block::Block(Launch& launch, uint64_t number)
    : idx_(unravel(number, launch.shape().grid)),
      shared_(launch.shape().shared_bytes),
      threads_(size_t{launch.shape().block.x} * launch.shape().block.y * launch.shape().block.z),
      warps_((threads_.size() + kWarpSize - 1) / kWarpSize),
      mbarriers_(launch, shared_),
      barriers_(launch, static_cast<unsigned>(threads_.size())) {
  for (size_t i = 0; i < threads_.size(); ++i) {
    Thread& thread = threads_[i];
    thread.block = this;
    thread.warp = &warps_[i / kWarpSize];
    thread.linear_idx = static_cast<unsigned>(i);
    thread.idx = unravel(i, launch.shape().block);
    thread.lane = static_cast<int>(i % kWarpSize);
    thread.stack = take_stack();
    thread.warp->add(&thread);
  }
}

// Fibers that have not ended are forgotten, their frames are not unwound: kernels own nothing.
Block::~Block() {
  for (const Thread& thread : threads_) {
    if (thread.stack != nullptr) give_back_stack(thread.stack);
  }
}

unsigned Block::exit(Thread* thread) {
  thread->warp->exit(*thread);
  return barriers_.exit();
}

void Block::check_end() const {
  if (!shared_.is_intact()) {
    throw KernelError(text(where(), ": wrote outside its ", shared_.bytes(), " bytes of dynamic shared memory"));
  }
  const std::string objection = mbarriers_.objection_at_end();
  if (!objection.empty()) throw KernelError(text(where(), ": ", objection));
}

std::string Block::where() const {
  return idx_.y == 0 && idx_.z == 0 ? text("block ", idx_.x) : text("block (", idx_.x, ", ", idx_.y, ", ", idx_.z, ")");
}

std::string Block::describe_waits() const {
  std::map<std::string, std::vector<unsigned>> waits;
  for (const Thread& thread : threads_) {
    if (thread.state == ThreadState::kBlocked) waits[thread.waits_for].push_back(thread.linear_idx);
    if (thread.state == ThreadState::kReady) waits["mbarrier_try_wait or a bulk wait"].push_back(thread.linear_idx);
  }
  std::string all;
  for (const auto& [reason, threads] : waits) {
    all += text(all.empty() ? "" : ", ", threads.size(), threads.size() == 1 ? " thread in " : " threads in ", reason,
                " (", threads.front(), threads.size() > 1 ? " ..." : "", ")");
  }
  return all + mbarriers_.describe();
}

}  // namespace deep_a2a::emulator
