#include <utility>

#include "cuda/api.hpp"
#include "cuda/context.cuh"
#include "cuda/network.cuh"
#include "nvshmem/job.hpp"
#include "nvshmem/put_meter.hpp"
#include "protocol/layout.hpp"

namespace deep_a2a::network {
namespace {

namespace ptx = cuda::ptx;

constexpr int kMaxWarps = 16;
constexpr int kHoldThreads = 256;

struct Ranks {
  Topology topology;
  int rank;
  const int* pes;
  char* window;
  uint64_t* pinned;
  uint64_t timeout_ns;

  __device__ uint64_t* hold_word(uint64_t hold, int from) const {
    return reinterpret_cast<uint64_t*>(window) + static_cast<int64_t>(hold & 1) * topology.num_ranks + from;
  }
};

__device__ bool wait_for(const Ranks& r, const uint64_t* word, uint64_t expected) {
  const uint64_t start = ptx::global_timer();
  while (ptx::ld_acquire_sys(word) < expected) {
    if (ptx::global_timer() - start < r.timeout_ns) continue;
    ptx::st_release_sys(r.pinned + 1, 1);
    return false;
  }
  return true;
}

// Two words in turn: whoever sends the signal after next has had one that was sent after this one came.
__global__ void hold_kernel(const __grid_constant__ Ranks r, uint64_t hold) {
  const bool opened = threadIdx.x != 0 || wait_for(r, r.pinned, hold);
  if (__syncthreads_and(opened) == 0) return;
  const int step = static_cast<int>(blockDim.x), first = static_cast<int>(threadIdx.x);
  for (int peer = first; peer < r.topology.num_ranks; peer += step) {
    if (peer != r.rank) cuda::remote_signal(r.hold_word(hold, r.rank), hold, r.pes[peer]);
  }
  for (int peer = first; peer < r.topology.num_ranks; peer += step) {
    if (peer != r.rank && !wait_for(r, r.hold_word(hold, peer), hold)) return;
  }
}

__device__ void put_chunk(PutBy by, char* to, const char* from, int64_t bytes, uint64_t* word, uint64_t value, int pe) {
  if (by == PutBy::kWarp) {
    cuda::put_signal_warp(to, from, bytes, word, value, pe);
  } else if (by == PutBy::kThread) {
    if (cuda::lane_idx() == 0) cuda::put_signal_thread(to, from, bytes, word, value, pe);
  } else {
    auto* word_there = static_cast<uint64_t*>(cuda::mapped_at(word, pe));
    cuda::store_signal_warp(cuda::mapped_at(to, pe), from, bytes, word_there, value);
  }
}

__global__ void __launch_bounds__(kMaxWarps* cuda::kWarpThreads, 1)
    put_kernel(const __grid_constant__ Ranks r, const __grid_constant__ PutMeter::Layout at, PutBy by, int64_t bytes,
               int64_t chunk_bytes, uint64_t round) {
  const int node = r.topology.node_of(r.rank), streams = r.topology.num_peer_nodes();
  const int64_t chunks = ceil_div(bytes, chunk_bytes), all = chunks * streams;
  auto* words = reinterpret_cast<uint64_t*>(r.window + at.words_offset);
  for (int64_t i = cuda::grid_warp_idx(); i < all; i += int64_t{cuda::num_warps()} * gridDim.x) {
    const int stream = static_cast<int>(i % streams);
    const int64_t chunk = i / streams, offset = chunk * chunk_bytes;
    const int peer_node = r.topology.stream_node(node, stream), there = r.topology.stream_idx(peer_node, node);
    put_chunk(by, r.window + at.in_offset + there * at.area_bytes + offset,
              r.window + at.out_offset + stream * at.area_bytes + offset,
              bytes - offset < chunk_bytes ? bytes - offset : chunk_bytes, words + there * chunks + chunk, round,
              r.pes[r.topology.rail_peer(r.rank, peer_node)]);
  }
  const int64_t step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < all; i += step) {
    if (!wait_for(r, words + i, round)) return;
  }
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), cudaStream_t stream, int blocks, int threads, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  cuda::check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "the launch of a kernel");
}

}  // namespace

PutMeter::Layout PutMeter::layout(const Topology& topology, int64_t bytes, int64_t chunk_bytes) {
  check_argument(bytes > 0 && bytes % 16 == 0, "bytes must be a multiple of 16, got ", bytes);
  check_argument(chunk_bytes > 0 && chunk_bytes % 16 == 0, "chunk_bytes must be a multiple of 16, got ", chunk_bytes);
  const int64_t streams = topology.num_peer_nodes(), words = ceil_div(bytes, chunk_bytes) * streams;
  Layout at{};
  at.words_offset = align_up<int64_t>(2 * topology.num_ranks * kWordBytes, kRegionAlignment);
  at.out_offset = at.words_offset + align_up<int64_t>(words * kWordBytes, kRegionAlignment);
  at.area_bytes = align_up<int64_t>(bytes, kRegionAlignment);
  at.in_offset = at.out_offset + streams * at.area_bytes;
  at.bytes = at.in_offset + streams * at.area_bytes;
  return at;
}

PutMeter::PutMeter(const Topology& topology, int rank, int device, std::shared_ptr<cuda::Window> window,
                   std::vector<int> pes, double timeout_s)
    : topology_(topology),
      rank_(rank),
      device_(device),
      window_(std::move(window)),
      timeout_ns_(static_cast<uint64_t>(timeout_s * 1e9)) {
  check_argument(static_cast<int>(pes.size()) == topology.num_ranks, "expected ", topology.num_ranks, " PEs, got ",
                 pes.size());
  for (int node = 0; node < topology.num_nodes(); ++node) {
    const int peer = topology.rail_peer(rank, node);
    is_mapped_ = is_mapped_ && mapped_at_pe(window_->data(), pes[static_cast<size_t>(peer)]) != nullptr;
  }
  const cuda::OnDevice on(device);
  void* memory = nullptr;
  cuda::check_cuda(cudaMalloc(&memory, pes.size() * sizeof(int)), "cudaMalloc");
  pes_ = static_cast<int*>(memory);
  cuda::check_cuda(cudaMemcpy(pes_, pes.data(), pes.size() * sizeof(int), cudaMemcpyHostToDevice), "cudaMemcpy");
  cuda::check_cuda(cudaHostAlloc(&memory, 2 * sizeof(uint64_t), cudaHostAllocMapped | cudaHostAllocPortable),
                   "cudaHostAlloc");
  pinned_ = static_cast<uint64_t*>(memory);
  pinned_[0] = pinned_[1] = 0;
  // Loaded now: a kernel that loads later may have to wait for one that waits for it.
  cudaFuncAttributes attributes;
  cuda::check_cuda(cudaFuncGetAttributes(&attributes, hold_kernel), "cudaFuncGetAttributes");
  cuda::check_cuda(cudaFuncGetAttributes(&attributes, put_kernel), "cudaFuncGetAttributes");
}

PutMeter::~PutMeter() {
  cudaFreeHost(pinned_);
  cudaFree(pes_);
}

void PutMeter::hold(cudaStream_t stream) {
  const cuda::OnDevice on(device_);
  launch(hold_kernel, stream, 1, kHoldThreads, Ranks{topology_, rank_, pes_, window_->data(), pinned_, timeout_ns_},
         ++holds_);
}

void PutMeter::open() { __atomic_store_n(pinned_, holds_, __ATOMIC_RELEASE); }

bool PutMeter::late() const { return __atomic_load_n(pinned_ + 1, __ATOMIC_ACQUIRE) != 0; }

void PutMeter::put(cudaStream_t stream, const PutLoad& load) {
  const Layout at = layout(topology_, load.bytes, load.chunk_bytes);
  check_argument(at.bytes <= window_->bytes(), "the window has ", window_->bytes(), " bytes, but it takes ", at.bytes);
  check_argument(load.num_sms >= 1, "num_sms must be at least 1, got ", load.num_sms);
  check_argument(load.num_warps >= 1 && load.num_warps <= kMaxWarps, "num_warps must be in [1, ", kMaxWarps, "], got ",
                 load.num_warps);
  check_argument(load.by != PutBy::kStores || is_mapped_, "stores need the memory of every rail peer mapped here");
  if (topology_.num_peer_nodes() == 0) return;
  const cuda::OnDevice on(device_);
  launch(put_kernel, stream, load.num_sms, load.num_warps * cuda::kWarpThreads,
         Ranks{topology_, rank_, pes_, window_->data(), pinned_, timeout_ns_}, at, load.by, load.bytes,
         load.chunk_bytes, ++puts_);
}

}  // namespace deep_a2a::network
