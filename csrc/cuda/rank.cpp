#include "cuda/rank.hpp"

#include <sched.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "cuda/farewell.hpp"
#include "protocol/agree.hpp"
#include "protocol/faults.hpp"

namespace deep_a2a::cuda {
namespace {

uint64_t read_pinned(const uint64_t& word) { return __atomic_load_n(&word, __ATOMIC_ACQUIRE); }

bool is_aligned(const void* address, int64_t pitch) {
  return reinterpret_cast<uintptr_t>(address) % kRowAlignment == 0 && pitch % kRowAlignment == 0;
}

}  // namespace

Rank::Rank(const Shape& shape, int rank, int device, std::vector<std::shared_ptr<Window>> windows,
           const std::vector<int>& rail_pes, std::vector<std::shared_ptr<Window>> rail_windows, double timeout_s,
           std::optional<uint64_t> delay_seed)
    : device_(device), windows_(std::move(windows)), rail_windows_(std::move(rail_windows)), team_{}, stream_(device) {
  validate(shape);
  const Topology& t = shape.topology;
  check_argument(t.num_nodes() == 1 || kHasNetwork, "this module is built without the network: it needs all ranks on ",
                 "one node, got ", t.num_nodes(), " nodes");
  check_argument(t.num_nodes() <= kMaxNodes, "there may be ", kMaxNodes, " nodes, got ", t.num_nodes());
  const size_t num_rail_pes = t.num_nodes() == 1 ? 0 : static_cast<size_t>(t.num_nodes());
  check_argument(rail_pes.size() == num_rail_pes && rail_windows_.size() == num_rail_pes, "expected ", num_rail_pes,
                 " rail_pes and rail_windows, got ", rail_pes.size(), " and ", rail_windows_.size());
  check_argument(t.ranks_per_node <= kMaxRanksPerNode, "ranks_per_node must be at most ", kMaxRanksPerNode, ", got ",
                 t.ranks_per_node);
  check_argument(int64_t{shape.max_tokens} * shape.num_topk * t.ranks_per_node <= INT32_MAX,
                 "num_max_tokens_per_rank * num_topk * ranks_per_node must fit 31 bits, got ", shape.max_tokens, " * ",
                 shape.num_topk, " * ", t.ranks_per_node);
  check_argument(static_cast<int>(windows_.size()) == t.ranks_per_node, "expected ", t.ranks_per_node, " windows, got ",
                 windows_.size());
  team_.shape = shape;
  team_.sizes = Sizes::of(shape, rank);
  team_.layout = make_layout(shape);
  team_.rank = rank;
  team_.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
  team_.delay_seed = delay_seed ? (*delay_seed << 8) + static_cast<uint64_t>(rank) + 1 : 0;
  for (size_t local = 0; local < windows_.size(); ++local) {
    check_argument(windows_[local]->bytes() >= team_.layout.bytes, "a window has ", windows_[local]->bytes(),
                   " bytes, expected ", team_.layout.bytes);
    team_.windows[local] = windows_[local]->data();
  }

  const OnDevice on(device);
  limits_ = prepare_kernels(device);
  scratch_words_ = BlockCounts::words(shape) * limits_.num_sms;
  const auto control_bytes = sizeof(Control) + static_cast<size_t>(scratch_words_ * shape.num_lanes) * 4;
  check_cuda(cudaMalloc(&control_memory_, control_bytes), "cudaMalloc of the lanes' state");
  check_cuda(cudaMemset(control_memory_, 0, control_bytes), "cudaMemset of the lanes' state");
  team_.control = static_cast<Control*>(control_memory_);
  std::vector<Rail> rails;
  for (size_t node = 0; node < num_rail_pes; ++node) {
    rails.push_back({rail_windows_[node] != nullptr ? rail_windows_[node]->data() : nullptr, rail_pes[node]});
  }
  check_cuda(cudaMemcpy(team_.control->rails, rails.data(), rails.size() * sizeof(Rail), cudaMemcpyHostToDevice),
             "cudaMemcpy of the rail peers");
  scratch_ = reinterpret_cast<int32_t*>(team_.control + 1);
  const auto mailbox_bytes = sizeof(Mailbox) + static_cast<size_t>(shape.num_lanes) * refused_bytes();
  check_cuda(cudaHostAlloc(&mailbox_memory_, mailbox_bytes, cudaHostAllocMapped | cudaHostAllocPortable),
             "cudaHostAlloc of the mailbox");
  std::memset(mailbox_memory_, 0, mailbox_bytes);
  team_.mailbox = static_cast<Mailbox*>(mailbox_memory_);
  team_.refused_counts = reinterpret_cast<char*>(team_.mailbox + 1);

  plan_combine(shape, 1, limits_);  // throws now what it would throw later
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

Rank::~Rank() {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_);
  cudaFree(control_memory_);  // waits for what is on any stream, releases of slots among it
  // Symmetric memory is given back to its heap; nobody waits for anybody there.
  if (shape().topology.num_nodes() == 1) say_farewell(shape(), team_.rank, device_, windows_);
  cudaFreeHost(mailbox_memory_);
  cudaSetDevice(before);
}

int64_t Rank::source_bytes(int num_tokens) const { return SourceHandle{}.lay_out(shape(), num_tokens, nullptr); }

int64_t Rank::relay_bytes() const { return RelayHandle{}.lay_out(shape(), nullptr); }

size_t Rank::refused_bytes() const {
  return static_cast<size_t>(shape().topology.num_ranks * CountVector::bytes(shape()));
}

char* Rank::own(Region region, int instance) const {
  return team_.windows[shape().topology.local_of(team_.rank)] + team_.layout.offset(region, instance);
}

void Rank::check_dispatch(const DispatchTask& task) const {
  const Shape& s = shape();
  const RowFormat& format = task.args.format;
  check_argument(task.args.num_tokens >= 0 && task.args.num_tokens <= s.max_tokens, "x has ", task.args.num_tokens,
                 " tokens, expected at most num_max_tokens_per_rank = ", s.max_tokens);
  check_argument(task.lane >= 0 && task.lane < s.num_lanes, "lane must be in [0, ", s.num_lanes, "), got ", task.lane);
  check_argument(task.args.slot >= 0 && task.args.slot < s.num_slots, "slot must be in [0, ", s.num_slots, "), got ",
                 task.args.slot);
  check_argument(format.payload_bytes > 0 && format.payload_bytes % kRowAlignment == 0 &&
                     format.payload_bytes <= s.max_payload_bytes(),
                 "a row of x must have whole 16 bytes, at most ", s.max_payload_bytes(), ", got ",
                 format.payload_bytes);
  check_argument(format.scale_bytes >= 0 && format.scale_bytes <= s.max_scale_bytes(), "a row of scales has ",
                 format.scale_bytes, " bytes, expected at most ", s.max_scale_bytes());
  check_argument(task.args.cast == Cast::kNone || task.args.scales == nullptr,
                 "scales are given with a cast, which makes them, expected none");
}

void Rank::place_input(cudaStream_t stream, DispatchTask& task) {
  DispatchArgs& args = task.args;
  char* window_rows = own(Region::kInputRows, task.lane);
  const bool cast_by_source = args.cast != Cast::kNone && shape().row_per_expert();  // reads rows with ordinary loads
  const int64_t bytes = args.cast != Cast::kNone ? shape().max_payload_bytes() : args.format.payload_bytes;
  if (args.num_tokens <= 1) args.x_pitch = bytes;
  const bool read_in_place = is_aligned(args.x, args.x_pitch) && (cast_by_source || !shape().row_per_expert());
  const bool lent = args.x == window_rows && args.x_pitch == bytes;
  if (lent || read_in_place || args.num_tokens == 0) return;
  const auto* first = static_cast<const char*>(args.x);
  check_argument(args.x_pitch >= bytes, "x has rows of ", bytes, " bytes that start ", args.x_pitch,
                 " bytes apart, expected rows that do not overlap");
  const char* end_of_lent = window_rows + shape().max_tokens * shape().max_payload_bytes();
  check_argument(first >= end_of_lent || first + args.num_tokens * args.x_pitch <= window_rows,
                 "x is a part of the lent input, expected its first rows as they are, or memory of your own");
  if (task.half != Half::kReceive)
    check_cuda(cudaMemcpy2DAsync(window_rows, static_cast<size_t>(bytes), args.x, static_cast<size_t>(args.x_pitch),
                                 static_cast<size_t>(bytes), static_cast<size_t>(args.num_tokens),
                                 cudaMemcpyDeviceToDevice, stream),
               "the copy of the input into the window");
  args.x = window_rows;
  args.x_pitch = bytes;
}

uint64_t Rank::dispatch(const Launch& launch, DispatchTask task, void* source, void* relay,
                        const ColumnScales& columns) {
  check_dispatch(task);
  const OnDevice on(device_);
  const Launch used{launch.stream, check_num_sms(launch.num_sms, limits_)};
  task.plan = plan_dispatch(shape(), task.args, limits_);
  task.source.lay_out(shape(), task.args.num_tokens, static_cast<char*>(source));
  task.relay.lay_out(shape(), static_cast<char*>(relay));
  task.block_counts = scratch_ + task.lane * scratch_words_;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(launch.stream, &capture), "cudaStreamIsCapturing");
  if (capture == cudaStreamCaptureStatusNone) task.ticket = task.half == Half::kReceive ? tickets_ : ++tickets_;
  place_input(launch.stream, task);
  launch_dispatch(used, team_, task);
  if (columns.words != nullptr && columns.pitch > 0 && task.half != Half::kSend) {
    launch_scales(used, ScalesTask::of(shape(), task.args, task.result.counts, own(Region::kRecvScales, task.args.slot),
                                       columns));
  }
  return task.ticket;
}

void Rank::copy_out(cudaStream_t stream, int slot, int64_t num_rows, const RowFormat& format, void* rows,
                    void* scales) {
  if (num_rows == 0) return;
  const OnDevice on(device_);
  const auto count = static_cast<size_t>(num_rows), payload = static_cast<size_t>(format.payload_bytes);
  check_cuda(cudaMemcpyAsync(rows, own(Region::kRecvRows, slot), count * payload, cudaMemcpyDeviceToDevice, stream),
             "the copy of received rows");
  if (scales == nullptr) return;
  const auto bytes = static_cast<size_t>(format.scale_bytes);
  check_cuda(cudaMemcpy2DAsync(scales, bytes, own(Region::kRecvScales, slot), static_cast<size_t>(format.scale_pitch()),
                               bytes, count, cudaMemcpyDeviceToDevice, stream),
             "the copy of received scales");
}

void Rank::combine(const Launch& launch, CombineTask task, void* source, void* relay, int64_t num_rows) {
  const OnDevice on(device_);
  const Launch used{launch.stream, check_num_sms(launch.num_sms, limits_)};
  char* window_rows = own(Region::kCombineRows, task.lane);
  check_argument(task.lane >= 0 && task.lane < shape().num_lanes, "lane must be in [0, ", shape().num_lanes, "), got ",
                 task.lane);
  task.plan = plan_combine(shape(), used.num_sms, limits_);
  task.source.lay_out(shape(), task.num_tokens, static_cast<char*>(source));
  task.relay.lay_out(shape(), static_cast<char*>(relay));
  const bool lent = task.args.rows == window_rows;
  if (task.half != Half::kReceive && !shape().row_per_expert() && !lent && num_rows > 0) {
    const auto* first = static_cast<const char*>(task.args.rows);
    const int64_t bytes = num_rows * shape().max_payload_bytes();
    check_argument(
        first >= window_rows + shape().slot_rank_rows() * shape().max_payload_bytes() || first + bytes <= window_rows,
        "x is a part of the lent expert output, expected its first rows as they are, or memory of your own");
    check_cuda(cudaMemcpyAsync(window_rows, task.args.rows, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                               launch.stream),
               "the copy of expert outputs into the window");
  }
  check_argument(!shape().row_per_expert() || is_aligned(task.args.rows, 0),
                 "x must start at a multiple of 16 bytes, got address ", task.args.rows);
  launch_combine(used, team_, task);
}

void Rank::release(cudaStream_t stream, int slot) {
  check_argument(slot >= 0 && slot < shape().num_slots, "slot must be in [0, ", shape().num_slots, "), got ", slot);
  const OnDevice on(device_);
  launch_release(stream, team_, slot);
}

ReceivedSizes Rank::wait_counts(int lane, uint64_t ticket, cudaStream_t stream) {
  const CountReport& report = team_.mailbox->counts[lane];
  for (int64_t poll = 1; read_pinned(report.ticket) < ticket; ++poll) {
    check_faults();
    if (poll % 1024 == 0) {  // a kernel that has failed reports nothing
      const cudaError_t status = cudaStreamQuery(stream);
      if (status != cudaSuccess && status != cudaErrorNotReady) check_cuda(status, "an operation on the stream");
      sched_yield();
    }
  }
  const ReceivedSizes sizes{report.num_rows, report.num_rank_rows};
  check_faults();
  check_refusals(lane);
  if (sizes.num_rows == kRefusedRows) {
    throw CommError("this dispatch was refused like one before it on lane " + std::to_string(lane) +
                    ", whose reason had not been raised yet: of two, the reason of the first is kept");
  }
  return sizes;
}

void Rank::check_faults() {
  if (read_pinned(team_.mailbox->fault_set) != 0) std::rethrow_exception(fault());
}

WireBytes Rank::wire_bytes() const {
  const OnDevice on(device_);
  unsigned long long bytes[2] = {0, 0};
  const unsigned long long* counters[2] = {&team_.control->wire_bytes, &team_.control->network_bytes};
  for (int i = 0; i < 2; ++i) {
    check_cuda(cudaMemcpyAsync(&bytes[i], counters[i], sizeof(bytes[i]), cudaMemcpyDeviceToHost, stream_.get()),
               "reading the count of bytes");
  }
  stream_.synchronize();
  return {static_cast<int64_t>(bytes[0]), static_cast<int64_t>(bytes[1])};
}

void Rank::check() {
  check_faults();
  for (int lane = 0; lane < shape().num_lanes; ++lane) check_refusals(lane);
}

void Rank::check_refusals(int lane) {
  const std::lock_guard<std::mutex> lock(refusals_);
  RefusalReport& report = team_.mailbox->refusals[lane];
  const uint64_t told = read_pinned(report.told);
  if (told == report.read) return;
  const Verdict verdict =
      agree(shape(), AllCounts(shape(), team_.refused_counts + static_cast<size_t>(lane) * refused_bytes()));
  if (!verdict.slots_disagree) __atomic_store_n(&report.read, told, __ATOMIC_RELEASE);  // else it is raised for ever
  if (!verdict.refusal) throw CommError("a dispatch was refused, and its counts do not say why");
  std::rethrow_exception(verdict.refusal);
}

std::exception_ptr Rank::fault() const {
  const OnDevice on(device_);
  const FaultRecord& record = team_.mailbox->fault;
  // Windows of other nodes cannot be read, and what is known of some ranks alone would mislead.
  std::vector<uint64_t> begun(shape().topology.num_nodes() == 1 ? windows_.size() : 0, 0);
  for (size_t local = 0; local < begun.size(); ++local) {
    const char* word = team_.windows[local] + team_.layout.offset(Region::kProgress, record.lane);
    if (cudaMemcpyAsync(&begun[local], word, 8, cudaMemcpyDeviceToHost, stream_.get()) != cudaSuccess ||
        cudaStreamSynchronize(stream_.get()) != cudaSuccess) {
      cudaGetLastError();
      begun.clear();
      break;
    }
  }
  return error_of(record, team_.rank, shape().topology, begun);
}

}  // namespace deep_a2a::cuda
