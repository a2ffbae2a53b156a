#include "cuda/api.hpp"
#include "cuda/context.cuh"
#include "cuda/launch.hpp"
#include "cuda/measure.hpp"
#include "cuda/ring.cuh"
#include "cuda/shared_sizes.hpp"

namespace deep_a2a::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kPieceBytes = 7168;
constexpr int kStages = 3;
constexpr int kSharedBytes = arena_begin(1) + kWarps * kStages * kPieceBytes;

struct Peers {
  char* windows[kMaxRanksPerNode];
  int rank;
  int num_ranks;
};

__device__ bool wait_for(const uint64_t* word, uint64_t expected, uint64_t timeout_ns, uint64_t* late) {
  const uint64_t start = ptx::global_timer();
  while (ptx::ld_acquire_sys(word) < expected) {
    if (ptx::global_timer() - start < timeout_ns) continue;
    ptx::st_release_sys(late, 1);
    return false;
  }
  return true;
}

// One warp, a lane for each rank.
__global__ void hold_kernel(const __grid_constant__ Peers peers, uint64_t* pinned, uint64_t hold, uint64_t timeout_ns) {
  const int peer = static_cast<int>(threadIdx.x);
  const bool opened = peer != 0 || wait_for(pinned, hold, timeout_ns, pinned + 1);
  if (!__all_sync(kFullWarp, opened) || peer >= peers.num_ranks) return;
  ptx::st_release_sys(reinterpret_cast<uint64_t*>(peers.windows[peer]) + peers.rank, hold);
  wait_for(reinterpret_cast<uint64_t*>(peers.windows[peers.rank]) + peer, hold, timeout_ns, pinned + 1);
}

// A warp's ring, one thread: pieces of all peers in turn.
__global__ void __launch_bounds__(kThreads, 1)
    copy_kernel(const __grid_constant__ Peers peers, Direction direction, int64_t bytes) {
  auto& shared = *reinterpret_cast<BlockShared*>(ptx::dynamic_shared());
  init_barriers(shared.barriers, kMaxBarriers);
  __syncthreads();
  if (lane_idx() != 0) return;
  char* stages = ptx::dynamic_shared() + arena_begin(1) + warp_idx() * kStages * kPieceBytes;
  uint64_t* full = shared.barriers + warp_idx() * kStages;
  const int others = peers.num_ranks - 1;
  const int64_t pieces = ceil_div<int64_t>(bytes, kPieceBytes) * others, step = int64_t{kWarps} * gridDim.x;
  const int64_t half = align_up<int64_t>(bytes, kPieceBytes) * peers.num_ranks;
  // A rank's memory: what it sends to each rank, then what it gets from each.
  const auto at = [&](int owner, int other, int64_t offset) {
    return peers.windows[owner] + Meter::kFlagBytes + align_up<int64_t>(bytes, kPieceBytes) * other + offset;
  };
  const auto peer_of = [&](int64_t piece) {
    return (peers.rank + 1 + static_cast<int>(piece % others)) % peers.num_ranks;
  };
  const auto offset_of = [&](int64_t piece) { return piece / others * kPieceBytes; };
  const auto size_of = [&](int64_t piece) {
    return static_cast<uint32_t>(bytes - offset_of(piece) < kPieceBytes ? bytes - offset_of(piece) : kPieceBytes);
  };
  int64_t next = grid_warp_idx();
  RingPosition filling, storing;
  const auto refill = [&] {
    if (next >= pieces) return;
    const int peer = peer_of(next);
    const char* from =
        direction == Direction::kPush ? at(peers.rank, peer, offset_of(next)) : at(peer, peers.rank, offset_of(next));
    ptx::mbarrier_arrive_expect_tx(full + filling.stage, size_of(next));
    ptx::bulk_load(stages + filling.stage * kPieceBytes, from, size_of(next), full + filling.stage);
    filling.advance(kStages);
    next += step;
  };
  for (int i = 0; i < kStages; ++i) refill();
  for (int64_t piece = grid_warp_idx(); piece < pieces; piece += step) {
    const int peer = peer_of(piece);
    wait_full(full + storing.stage, storing.parity);
    char* to = half + (direction == Direction::kPush ? at(peer, peers.rank, offset_of(piece))
                                                     : at(peers.rank, peer, offset_of(piece)));
    ptx::bulk_store(to, stages + storing.stage * kPieceBytes, size_of(piece));
    ptx::bulk_commit();
    storing.advance(kStages);
    if (piece == grid_warp_idx()) continue;
    ptx::bulk_wait_read<1>();
    refill();
  }
  ptx::bulk_wait<0>();
}

Peers peers_of(int rank, const std::vector<std::shared_ptr<Window>>& windows) {
  Peers peers{};
  peers.rank = rank;
  peers.num_ranks = static_cast<int>(windows.size());
  for (size_t i = 0; i < windows.size(); ++i) peers.windows[i] = windows[i]->data();
  return peers;
}

}  // namespace

Meter::Meter(int rank, int device, std::vector<std::shared_ptr<Window>> windows, double timeout_s)
    : rank_(rank), device_(device), windows_(std::move(windows)), timeout_ns_(static_cast<uint64_t>(timeout_s * 1e9)) {
  check_argument(windows_.size() >= 1 && windows_.size() <= kMaxRanksPerNode, "expected 1 to ", kMaxRanksPerNode,
                 " windows, got ", windows_.size());
  const OnDevice on(device);
  void* memory = nullptr;
  check_cuda(cudaHostAlloc(&memory, 2 * sizeof(uint64_t), cudaHostAllocMapped | cudaHostAllocPortable),
             "cudaHostAlloc");
  pinned_ = static_cast<uint64_t*>(memory);
  pinned_[0] = pinned_[1] = 0;
  check_cuda(cudaFuncSetAttribute(copy_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
             "cudaFuncSetAttribute");
}

Meter::~Meter() { cudaFreeHost(pinned_); }

void Meter::hold(cudaStream_t stream) {
  const OnDevice on(device_);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(kWarpThreads);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, hold_kernel, peers_of(rank_, windows_), pinned_, ++holds_, timeout_ns_),
             "the launch of a kernel");
}

void Meter::open() { __atomic_store_n(pinned_, holds_, __ATOMIC_RELEASE); }

bool Meter::late() const { return __atomic_load_n(pinned_ + 1, __ATOMIC_ACQUIRE) != 0; }

void Meter::copy_all_to_all(cudaStream_t stream, Direction direction, int64_t bytes, int num_sms) {
  const OnDevice on(device_);
  const int64_t room = windows_[static_cast<size_t>(rank_)]->bytes() - kFlagBytes;
  const int64_t needed = 2 * align_up<int64_t>(bytes, kPieceBytes) * static_cast<int64_t>(windows_.size());
  check_argument(bytes > 0 && bytes % kRowAlignment == 0 && needed <= room, "bytes must be a multiple of 16 for which ",
                 room, " bytes suffice, got ", bytes, " which take ", needed);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(num_sms));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, copy_kernel, peers_of(rank_, windows_), direction, bytes),
             "the launch of a kernel");
}

}  // namespace deep_a2a::cuda
