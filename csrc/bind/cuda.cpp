// The module deep_a2a._cuda, and deep_a2a._emulated where the emulator stands in for the GPU. Python has checked
// shapes, dtypes and strides; pointers and streams come as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/errors.hpp"
#include "bind/network.hpp"
#include "cuda/measure.hpp"
#include "cuda/rank.hpp"

#ifndef DEEP_A2A_MODULE
#define DEEP_A2A_MODULE _cuda
#endif

namespace py = pybind11;
namespace da = deep_a2a;
namespace cuda = deep_a2a::cuda;

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

bool can_access_peer(int device, int peer) {
  int can = 0;
  cuda::check_cuda(cudaDeviceCanAccessPeer(&can, device, peer), "cudaDeviceCanAccessPeer");
  return can != 0;
}

std::string pci_bus_id(int device) {
  char id[32] = {};
  cuda::check_cuda(cudaDeviceGetPCIBusId(id, sizeof(id), device), "cudaDeviceGetPCIBusId");
  return id;
}

bool is_capturing(uintptr_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cuda::check_cuda(cudaStreamIsCapturing(stream_of(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void bind_device(py::module_& m) {
  m.def("device_count", &device_count);
  m.def("can_access_peer", &can_access_peer, py::arg("device"), py::arg("peer"));
  m.def("pci_bus_id", &pci_bus_id, py::arg("device"));
  m.def("is_capturing", &is_capturing, py::arg("stream"));
}

void bind_window(py::module_& m) {
  py::class_<cuda::Window, std::shared_ptr<cuda::Window>>(m, "Window", py::module_local())
      .def_static("create", &cuda::Window::create, py::arg("nbytes"), py::arg("device"),
                  py::call_guard<py::gil_scoped_release>())
      .def_static(
          "open",
          [](const py::bytes& handle, int64_t nbytes, int device) {
            return cuda::Window::open(handle, nbytes, device);
          },
          py::arg("handle"), py::arg("nbytes"), py::arg("device"))
      .def_property_readonly("handle", [](const cuda::Window& w) { return py::bytes(w.handle()); })
      .def_property_readonly("nbytes", &cuda::Window::bytes)
      .def_property_readonly("address", [](const cuda::Window& w) { return reinterpret_cast<uintptr_t>(w.data()); });
}

void bind_streams(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<cuda::Stream, std::shared_ptr<cuda::Stream>>(m, "Stream", py::module_local())
      .def(py::init<int>(), py::arg("device"))
      .def_property_readonly("handle", [](const cuda::Stream& s) { return reinterpret_cast<uintptr_t>(s.get()); })
      .def("synchronize", &cuda::Stream::synchronize, no_gil);
  py::class_<cuda::Event, std::shared_ptr<cuda::Event>>(m, "Event", py::module_local())
      .def(py::init<int>(), py::arg("device"))
      .def(
          "record", [](cuda::Event& e, uintptr_t stream) { e.record(stream_of(stream)); }, no_gil, py::arg("stream"))
      .def(
          "block", [](cuda::Event& e, uintptr_t stream) { e.block(stream_of(stream)); }, no_gil, py::arg("stream"))
      .def("synchronize", &cuda::Event::synchronize, no_gil)
      .def("done", &cuda::Event::done);
}

// The launch plans, for tests and tools.
void bind_plans(py::module_& m) {
  m.def(
      "plan_dispatch",
      [](const da::Shape& shape, int payload_bytes, int scale_bytes, da::Cast cast, int shared_bytes) {
        da::DispatchArgs args;
        args.format = {payload_bytes, scale_bytes, 0};
        args.cast = cast;
        const cuda::DispatchPlan plan = cuda::plan_dispatch(shape, args, {1, shared_bytes});
        return py::dict(py::arg("count_warps") = plan.count_warps, py::arg("ring_offset") = plan.ring_offset,
                        py::arg("move_warps") = plan.move_warps, py::arg("num_stages") = plan.num_stages,
                        py::arg("stage_bytes") = plan.stage_bytes, py::arg("side_offset") = plan.side_offset,
                        py::arg("routes_offset") = plan.routes_offset, py::arg("rows_offset") = plan.rows_offset,
                        py::arg("num_targets") = plan.num_targets, py::arg("chunk_bytes") = plan.chunk_bytes,
                        py::arg("num_chunks") = plan.num_chunks, py::arg("shared_bytes") = plan.shared_bytes);
      },
      py::arg("shape"), py::kw_only(), py::arg("payload_bytes"), py::arg("scale_bytes"), py::arg("cast"),
      py::arg("shared_bytes"));
  m.def(
      "plan_combine",
      [](const da::Shape& shape, int num_sms, int shared_bytes) {
        const cuda::CombinePlan plan = cuda::plan_combine(shape, num_sms, {num_sms, shared_bytes});
        return py::dict(py::arg("num_rings") = plan.num_rings, py::arg("num_stages") = plan.num_stages,
                        py::arg("chunk_bytes") = plan.chunk_bytes, py::arg("part_shift") = plan.part_shift,
                        py::arg("shared_bytes") = plan.shared_bytes);
      },
      py::arg("shape"), py::kw_only(), py::arg("num_sms"), py::arg("shared_bytes"));
}

uint64_t dispatch(cuda::Rank& rank, uintptr_t stream, int lane, int slot, cuda::Half half, int num_sms, uintptr_t x,
                  int64_t x_pitch, int num_tokens, int payload_bytes, uintptr_t scales, int64_t scales_pitch,
                  int scale_bytes, int format_code, uintptr_t topk_idx, int topk_idx_bytes, uintptr_t topk_weights,
                  da::Cast cast, da::ScaleFormat scale_format, bool zero_padding, bool cached, uintptr_t source,
                  uintptr_t relay, uintptr_t kept_counts, uintptr_t kept_routing, int64_t kept_capacity,
                  uintptr_t result_counts, uintptr_t result_routing, int64_t result_capacity, uintptr_t column_scales,
                  int64_t column_words) {
  cuda::DispatchTask task;
  task.args.x = pointer(x);
  task.args.x_pitch = x_pitch;
  task.args.scales = pointer(scales);
  task.args.scales_pitch = scales_pitch;
  task.args.topk_idx = pointer(topk_idx);
  task.args.topk_idx_bytes = topk_idx_bytes;
  task.args.topk_weights = pointer<float>(topk_weights);
  task.args.num_tokens = num_tokens;
  task.args.format = {payload_bytes, scale_bytes, format_code};
  task.args.cast = cast;
  task.args.scale_format = scale_format;
  task.args.slot = slot;
  task.args.zero_padding = zero_padding;
  task.lane = lane;
  task.half = half;
  task.cached = cached;
  task.kept = {pointer<int32_t>(kept_counts), pointer<int32_t>(kept_routing), kept_capacity};
  task.result = {pointer<int32_t>(result_counts), pointer<int32_t>(result_routing), result_capacity};
  return rank.dispatch({stream_of(stream), num_sms}, task, pointer(source), pointer(relay),
                       {pointer<uint32_t>(column_scales), column_words});
}

void combine(cuda::Rank& rank, uintptr_t stream, int lane, cuda::Half half, int num_sms, uintptr_t rows,
             int64_t num_rows, uintptr_t side, bool weighted, bool with_side, uintptr_t out, uintptr_t side_out,
             int num_tokens, uintptr_t source, uintptr_t relay, uintptr_t kept_counts, uintptr_t kept_routing,
             int64_t kept_capacity) {
  cuda::CombineTask task;
  task.args.rows = pointer(rows);
  task.args.side = pointer<float>(side);
  task.args.weighted = weighted;
  task.args.with_side = with_side;
  task.args.out = pointer(out);
  task.args.side_out = pointer<float>(side_out);
  task.lane = lane;
  task.half = half;
  task.num_tokens = num_tokens;
  task.kept = {pointer<int32_t>(kept_counts), pointer<int32_t>(kept_routing), kept_capacity};
  rank.combine({stream_of(stream), num_sms}, task, pointer(source), pointer(relay), num_rows);
}

void bind_rank(py::module_& m) {
  py::enum_<cuda::Half>(m, "Half", py::module_local())
      .value("send", cuda::Half::kSend)
      .value("receive", cuda::Half::kReceive)
      .value("both", cuda::Half::kBoth);
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<cuda::Rank>(m, "Rank", py::module_local())
      .def(py::init<const da::Shape&, int, int, std::vector<std::shared_ptr<cuda::Window>>, const std::vector<int>&,
                    std::vector<std::shared_ptr<cuda::Window>>, double, std::optional<uint64_t>>(),
           py::kw_only(), py::arg("shape"), py::arg("rank"), py::arg("device"), py::arg("windows"),
           py::arg("rail_pes") = std::vector<int>{},
           py::arg("rail_windows") = std::vector<std::shared_ptr<cuda::Window>>{}, py::arg("timeout_s"),
           py::arg("delay_seed") = py::none())
      .def_property_readonly("num_sms", &cuda::Rank::num_sms)
      .def("source_bytes", &cuda::Rank::source_bytes, py::arg("num_tokens"))
      .def("relay_bytes", &cuda::Rank::relay_bytes)
      .def("counts_words", [](const cuda::Rank& rank) { return cuda::ReceivedCounts::words(rank.shape()); })
      .def(
          "routing_words",
          [](const cuda::Rank& rank, int64_t capacity) { return cuda::ReceivedRouting::words(rank.shape(), capacity); },
          py::arg("capacity"))
      .def("dispatch", &dispatch, no_gil, py::kw_only(), py::arg("stream"), py::arg("lane"), py::arg("slot"),
           py::arg("half"), py::arg("num_sms"), py::arg("x"), py::arg("x_pitch"), py::arg("num_tokens"),
           py::arg("payload_bytes"), py::arg("scales"), py::arg("scales_pitch"), py::arg("scale_bytes"),
           py::arg("format_code"), py::arg("topk_idx"), py::arg("topk_idx_bytes"), py::arg("topk_weights"),
           py::arg("cast"), py::arg("scale_format"), py::arg("zero_padding"), py::arg("cached"), py::arg("source"),
           py::arg("relay"), py::arg("kept_counts"), py::arg("kept_routing"), py::arg("kept_capacity"),
           py::arg("result_counts"), py::arg("result_routing"), py::arg("result_capacity"), py::arg("column_scales"),
           py::arg("column_words"))
      .def(
          "copy_out",
          [](cuda::Rank& rank, uintptr_t stream, int slot, int64_t num_rows, int payload_bytes, int scale_bytes,
             uintptr_t rows, uintptr_t scales) {
            const da::RowFormat format{payload_bytes, scale_bytes, 0};
            rank.copy_out(stream_of(stream), slot, num_rows, format, pointer(rows), pointer(scales));
          },
          no_gil, py::kw_only(), py::arg("stream"), py::arg("slot"), py::arg("num_rows"), py::arg("payload_bytes"),
          py::arg("scale_bytes"), py::arg("rows"), py::arg("scales"))
      .def("combine", &combine, no_gil, py::kw_only(), py::arg("stream"), py::arg("lane"), py::arg("half"),
           py::arg("num_sms"), py::arg("rows"), py::arg("num_rows"), py::arg("side"), py::arg("weighted"),
           py::arg("with_side"), py::arg("out"), py::arg("side_out"), py::arg("num_tokens"), py::arg("source"),
           py::arg("relay"), py::arg("kept_counts"), py::arg("kept_routing"), py::arg("kept_capacity"))
      .def(
          "release", [](cuda::Rank& rank, uintptr_t stream, int slot) { rank.release(stream_of(stream), slot); },
          no_gil, py::arg("stream"), py::arg("slot"))
      .def(
          "wait_counts",
          [](cuda::Rank& rank, int lane, uint64_t ticket, uintptr_t stream) {
            const cuda::ReceivedSizes sizes = rank.wait_counts(lane, ticket, stream_of(stream));
            return std::make_pair(sizes.num_rows, sizes.num_rank_rows);
          },
          no_gil, py::arg("lane"), py::arg("ticket"), py::arg("stream"))
      .def("check", &cuda::Rank::check, no_gil)
      .def("check_faults", &cuda::Rank::check_faults, no_gil)
      .def_property_readonly("wire_bytes", [](const cuda::Rank& rank) {
        const cuda::WireBytes bytes = rank.wire_bytes();
        return std::make_pair(bytes.nvlink, bytes.network);
      });
}

void bind_meter(py::module_& m) {
  py::enum_<cuda::Direction>(m, "Direction", py::module_local())
      .value("push", cuda::Direction::kPush)
      .value("pull", cuda::Direction::kPull);
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<cuda::Meter>(m, "Meter", py::module_local())
      .def(py::init<int, int, std::vector<std::shared_ptr<cuda::Window>>, double>(), py::kw_only(), py::arg("rank"),
           py::arg("device"), py::arg("windows"), py::arg("timeout_s"))
      .def(
          "hold", [](cuda::Meter& meter, uintptr_t stream) { meter.hold(stream_of(stream)); }, no_gil,
          py::arg("stream"))
      .def("open", &cuda::Meter::open)
      .def("late", &cuda::Meter::late)
      .def(
          "copy_all_to_all",
          [](cuda::Meter& meter, uintptr_t stream, cuda::Direction direction, int64_t nbytes, int num_sms) {
            meter.copy_all_to_all(stream_of(stream), direction, nbytes, num_sms);
          },
          no_gil, py::kw_only(), py::arg("stream"), py::arg("direction"), py::arg("nbytes"), py::arg("num_sms"));
}

}  // namespace

PYBIND11_MODULE(DEEP_A2A_MODULE, m) {
  m.doc() = "The CUDA backend of deep_a2a: the protocol in kernels, over windows that GPUs of a host share.";
  py::module_::import("deep_a2a._cpu");  // Shape, Cast and ScaleFormat
  da::bind_errors();
  bind_device(m);
  bind_window(m);
  bind_streams(m);
  bind_plans(m);
  bind_rank(m);
  bind_meter(m);
#if defined(DEEP_A2A_NETWORK)
  da::bind_network(m);
#endif
#if defined(CUDART_VERSION)
  m.attr("cuda_major") = CUDART_VERSION / 1000;  // that the module was built with
#endif
}
