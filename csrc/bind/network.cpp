// The NVSHMEM job of this process, its memory, and the meter of puts. Python keeps the deadlines of collective calls:
// they run without the interpreter's lock.
#include "bind/network.hpp"

#include <pybind11/stl.h>

#include "nvshmem/heap.hpp"
#include "nvshmem/job.hpp"
#include "nvshmem/put_meter.hpp"

#if defined(DEEP_A2A_EMULATED)
#include "emulator/nvshmem_job.hpp"
#endif

namespace py = pybind11;

namespace deep_a2a {
namespace {

py::tuple as_tuple(const network::Version& version) {
  return py::make_tuple(version.major, version.minor, version.patch);
}

void bind_job(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::enum_<network::JobStatus>(m, "JobStatus", py::module_local())
      .value("none", network::JobStatus::kNone)
      .value("bootstrapped", network::JobStatus::kBootstrapped)
      .value("ready", network::JobStatus::kReady);
  m.def("compiled_version", [] { return as_tuple(network::compiled_version()); });
  m.def("library_version", [] { return as_tuple(network::library_version()); });
  m.def("job_status", &network::job_status);
  m.def("make_unique_id", [] { return py::bytes(network::make_unique_id()); });
  m.def(
      "join_job",
      [](const py::bytes& unique_id, int pe, int num_pes, int device) {
        const std::string id = unique_id;
        const py::gil_scoped_release released;
        network::join_job(id, pe, num_pes, device);
      },
      py::kw_only(), py::arg("unique_id"), py::arg("pe"), py::arg("num_pes"), py::arg("device"));
  m.def("share_job", &network::share_job, no_gil, py::arg("device"));
  m.def(
      "leave_job",
      [] {
        network::SymmetricHeap::instance().forget_all();
        network::leave_job();
      },
      no_gil);
  m.def("my_pe", &network::my_pe);
  m.def("num_pes", &network::num_pes);
  m.def(
      "transport_choice",
      [](int device) {
        const network::TransportChoice choice = network::transport_choice(device);
        return py::dict(py::arg("direct") = choice.direct, py::arg("proxy") = choice.proxy,
                        py::arg("needs_flush") = choice.needs_flush);
      },
      py::arg("device"));
}

network::SymmetricHeap& heap() { return network::SymmetricHeap::instance(); }

void bind_heap(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  struct Heap {};  // one in each process
  py::class_<Heap> bound(m, "SymmetricHeap", py::module_local());
  bound.attr("alignment") = network::SymmetricHeap::kAlignment;
  bound
      .def_static(
          "grow", [](int64_t nbytes, int device) { heap().grow(nbytes, device); }, no_gil, py::arg("nbytes"),
          py::arg("device"))
      .def_static(
          "free_ranges",
          [](const std::vector<int>& pes, int most) {
            py::list ranges;
            for (const network::Range& range : heap().free_ranges(pes, most)) {
              ranges.append(py::make_tuple(range.block, range.offset, range.bytes));
            }
            return ranges;
          },
          py::arg("pes"), py::arg("most"))
      .def_static(
          "take",
          [](int block, int64_t offset, int64_t nbytes, const std::vector<int>& pes, int device) {
            return heap().take({block, offset, nbytes}, pes, device);
          },
          no_gil, py::kw_only(), py::arg("block"), py::arg("offset"), py::arg("nbytes"), py::arg("pes"),
          py::arg("device"))
      .def_static(
          "reach", [](const cuda::Window& window, int pe, int device) { return heap().reach(window, pe, device); },
          py::arg("window"), py::arg("pe"), py::arg("device"))
      .def_static(
          "settle", [](double timeout_s, int device) { return heap().settle(timeout_s, device); }, no_gil,
          py::arg("timeout_s"), py::arg("device"))
      .def_static(
          "lose", [](const cuda::Window& window) { heap().lose(window); }, py::arg("window"))
      .def_static("nbytes", [] { return heap().bytes(); });
}

void bind_put_meter(py::module_& m) {
  using network::PutMeter;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::enum_<network::PutBy>(m, "PutBy", py::module_local())
      .value("warp", network::PutBy::kWarp)
      .value("thread", network::PutBy::kThread)
      .value("stores", network::PutBy::kStores);
  py::class_<PutMeter>(m, "PutMeter", py::module_local())
      .def_static(
          "layout",
          [](int num_ranks, int ranks_per_node, int64_t nbytes, int64_t chunk_bytes) {
            const PutMeter::Layout at = PutMeter::layout({num_ranks, ranks_per_node}, nbytes, chunk_bytes);
            return py::dict(py::arg("out_offset") = at.out_offset, py::arg("in_offset") = at.in_offset,
                            py::arg("area_bytes") = at.area_bytes, py::arg("nbytes") = at.bytes);
          },
          py::kw_only(), py::arg("num_ranks"), py::arg("ranks_per_node"), py::arg("nbytes"), py::arg("chunk_bytes"))
      .def(py::init([](int ranks_per_node, int rank, int device, std::shared_ptr<cuda::Window> window,
                       std::vector<int> pes, double timeout_s) {
             const Topology topology{static_cast<int>(pes.size()), ranks_per_node};
             return std::make_unique<PutMeter>(topology, rank, device, std::move(window), std::move(pes), timeout_s);
           }),
           py::kw_only(), py::arg("ranks_per_node"), py::arg("rank"), py::arg("device"), py::arg("window"),
           py::arg("pes"), py::arg("timeout_s"))
      .def(
          "hold", [](PutMeter& meter, uintptr_t stream) { meter.hold(reinterpret_cast<cudaStream_t>(stream)); }, no_gil,
          py::arg("stream"))
      .def("open", &PutMeter::open)
      .def("late", &PutMeter::late)
      .def(
          "put",
          [](PutMeter& meter, uintptr_t stream, int64_t nbytes, int64_t chunk_bytes, network::PutBy by, int num_sms,
             int num_warps) {
            meter.put(reinterpret_cast<cudaStream_t>(stream), {nbytes, chunk_bytes, by, num_sms, num_warps});
          },
          no_gil, py::kw_only(), py::arg("stream"), py::arg("nbytes"), py::arg("chunk_bytes"), py::arg("by"),
          py::arg("num_sms"), py::arg("num_warps"));
}

}  // namespace

void bind_network(py::module_& m) {
  bind_job(m);
  bind_heap(m);
  bind_put_meter(m);
#if defined(DEEP_A2A_EMULATED)
  m.def("set_network_seed", &emulator::set_network_seed, py::arg("seed"));
#endif
}

}  // namespace deep_a2a
