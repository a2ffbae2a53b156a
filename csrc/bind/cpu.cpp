// The module deep_a2a._cpu. Python has checked shapes, dtypes and strides; pointers come as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/errors.hpp"
#include "cpu/rank.hpp"
#include "cpu/row_math.hpp"

namespace py = pybind11;
namespace da = deep_a2a;
namespace cpu = deep_a2a::cpu;

namespace {

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* writable(uintptr_t address) { return reinterpret_cast<void*>(address); }

// A view of a vector that keeps its owner alive.
template <class T>
struct Column {
  std::shared_ptr<cpu::Received> owner;
  std::vector<T>* values;
};

template <class T>
void bind_column(py::module_& m, const char* name) {
  py::class_<Column<T>>(m, name, py::buffer_protocol()).def_buffer([](Column<T>& column) {
    return py::buffer_info(column.values->data(), static_cast<py::ssize_t>(column.values->size()));
  });
}

void bind_shape(py::module_& m) {
  py::enum_<da::Layout>(m, "Layout")
      .value("rank", da::Layout::kRank)
      .value("expert", da::Layout::kExpert)
      .value("padded", da::Layout::kPadded);
  py::class_<da::Shape>(m, "Shape")
      .def(py::init([](int num_ranks, int ranks_per_node, da::Layout layout, int hidden, int num_experts, int num_topk,
                       int max_tokens, int expert_alignment, int64_t expert_capacity, int64_t max_recv_rows,
                       int num_slots, int num_lanes, int64_t staging_bytes) {
             da::Shape shape{{num_ranks, ranks_per_node},
                             layout,
                             hidden,
                             num_experts,
                             num_topk,
                             max_tokens,
                             expert_alignment,
                             expert_capacity,
                             max_recv_rows,
                             num_slots,
                             num_lanes};
             da::validate(shape);
             shape.round_tokens = da::round_tokens_for(shape, staging_bytes);
             return shape;
           }),
           py::kw_only(), py::arg("num_ranks"), py::arg("ranks_per_node"), py::arg("layout"), py::arg("hidden"),
           py::arg("num_experts"), py::arg("num_topk"), py::arg("max_tokens"), py::arg("expert_alignment"),
           py::arg("expert_capacity"), py::arg("max_recv_rows"), py::arg("num_slots"), py::arg("num_lanes"),
           py::arg("staging_bytes") = 0)
      .def_property_readonly("slot_rows", &da::Shape::slot_rows)
      .def_property_readonly("slot_rank_rows", &da::Shape::slot_rank_rows)
      .def_property_readonly("num_rounds", &da::Shape::num_rounds)
      .def_property_readonly("tokens_per_round", &da::Shape::tokens_per_round)
      .def_property_readonly("num_local_experts", &da::Shape::num_local_experts)
      .def_property_readonly("window_bytes", [](const da::Shape& s) { return da::make_layout(s).bytes; });

  m.def(
      "regions",
      [](const da::Shape& shape) {
        const da::WindowLayout layout = da::make_layout(shape);
        py::list rows;
        da::visit_regions(
            shape, [&](da::Region region, const char* name, da::Scope scope, int64_t bytes, const char* holds) {
              const auto& extent = layout.extents[static_cast<int>(region)];
              rows.append(
                  py::make_tuple(name, da::num_instances(shape, scope), bytes, extent.offset, extent.stride, holds));
            });
        return rows;
      },
      py::arg("shape"), "(name, instances, bytes of one, offset, stride, what it holds) of every region of a window.");
}

void bind_window(py::module_& m) {
  py::class_<cpu::Window, std::shared_ptr<cpu::Window>>(m, "Window", py::buffer_protocol())
      .def_static("create", &cpu::Window::create, py::arg("nbytes"))
      .def_static("map", &cpu::Window::map, py::arg("fd"), py::arg("nbytes"))
      .def("close_fd", &cpu::Window::close_fd)
      .def_property_readonly("fd", &cpu::Window::fd)
      .def_property_readonly("address", [](const cpu::Window& w) { return reinterpret_cast<uintptr_t>(w.data()); })
      .def_buffer([](cpu::Window& w) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(w.data()), static_cast<py::ssize_t>(w.bytes()));
      });
}

void bind_received(py::module_& m) {
  bind_column<int32_t>(m, "IntColumn");
  bind_column<float>(m, "FloatColumn");
  py::class_<cpu::Received, std::shared_ptr<cpu::Received>> received(m, "Received");
  received.def_readonly("num_rows", &cpu::Received::num_rows)
      .def_readonly("num_rank_rows", &cpu::Received::num_rank_rows);
  const auto column = [&](const char* name, auto member) {
    received.def_property_readonly(name, [member](const std::shared_ptr<cpu::Received>& self) {
      using Vector = std::remove_reference_t<decltype((*self).*member)>;
      return Column<typename Vector::value_type>{self, &((*self).*member)};
    });
  };
  column("num_received", &cpu::Received::num_received);
  column("topk_idx", &cpu::Received::topk_idx);
  column("topk_weights", &cpu::Received::topk_weights);
  column("expert_rows", &cpu::Received::expert_rows);
  column("rows_per_rank", &cpu::Received::rows_per_rank);
  column("rows_per_expert", &cpu::Received::rows_per_expert);
  column("expert_offsets", &cpu::Received::expert_offsets);
  column("expert_load", &cpu::Received::expert_load);
  py::class_<cpu::Handle, std::shared_ptr<cpu::Handle>>(m, "Handle")
      .def_readonly("num_tokens", &cpu::Handle::num_tokens);
}

void bind_calls(py::module_& m) {
  py::class_<cpu::Event, std::shared_ptr<cpu::Event>>(m, "Event")
      .def("wait", &cpu::Event::wait, py::call_guard<py::gil_scoped_release>())
      .def("done", &cpu::Event::is_set);
  py::class_<cpu::DispatchCall, std::shared_ptr<cpu::DispatchCall>>(m, "DispatchCall")
      .def_readonly("handle", &cpu::DispatchCall::handle)
      .def_readonly("result", &cpu::DispatchCall::result)
      .def_readonly("counts", &cpu::DispatchCall::counts)
      .def_property_readonly("sent", [](const cpu::DispatchCall& call) { return call.sent; })
      .def_property_readonly("received", [](const cpu::DispatchCall& call) { return call.received; });
  py::class_<cpu::CombineCall, std::shared_ptr<cpu::CombineCall>>(m, "CombineCall")
      .def_property_readonly("sent", [](const cpu::CombineCall& call) { return call.sent; })
      .def_property_readonly("received", [](const cpu::CombineCall& call) { return call.received; });
}

std::shared_ptr<cpu::DispatchCall> dispatch(cpu::Rank& rank, int lane, int slot, uintptr_t x, int64_t x_pitch,
                                            int num_tokens, int payload_bytes, uintptr_t scales, int64_t scales_pitch,
                                            int scale_bytes, int format_code, uintptr_t topk_idx, int topk_idx_bytes,
                                            uintptr_t topk_weights, da::Cast cast, da::ScaleFormat scale_format,
                                            bool zero_padding, bool fixed_shapes, std::shared_ptr<cpu::Handle> cached) {
  da::DispatchArgs args;
  args.x = pointer(x);
  args.x_pitch = x_pitch;
  args.scales = pointer(scales);
  args.scales_pitch = scales_pitch;
  args.topk_idx = pointer(topk_idx);
  args.topk_idx_bytes = topk_idx_bytes;
  args.topk_weights = static_cast<const float*>(pointer(topk_weights));
  args.num_tokens = num_tokens;
  args.format = {payload_bytes, scale_bytes, format_code};
  args.cast = cast;
  args.scale_format = scale_format;
  args.slot = slot;
  args.zero_padding = zero_padding;
  args.fixed_shapes = fixed_shapes;
  return rank.dispatch(lane, args, std::move(cached));
}

std::shared_ptr<cpu::CombineCall> combine(cpu::Rank& rank, int lane, uintptr_t rows, uintptr_t side, bool weighted,
                                          bool with_side, uintptr_t out, uintptr_t side_out,
                                          std::shared_ptr<cpu::Handle> handle) {
  da::CombineArgs args;
  args.rows = pointer(rows);
  args.side = static_cast<const float*>(pointer(side));
  args.weighted = weighted;
  args.with_side = with_side;
  args.out = writable(out);
  args.side_out = static_cast<float*>(writable(side_out));
  return rank.combine(lane, args, std::move(handle));
}

void bind_rank(py::module_& m) {
  py::enum_<da::Cast>(m, "Cast")
      .value("none", da::Cast::kNone)
      .value("fp8_e4m3", da::Cast::kE4M3)
      .value("fp8_e5m2", da::Cast::kE5M2);
  py::enum_<da::ScaleFormat>(m, "ScaleFormat")
      .value("float32", da::ScaleFormat::kFloat32)
      .value("ue8m0", da::ScaleFormat::kUE8M0);
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<cpu::Rank>(m, "Rank")
      .def(
          py::init<const da::Shape&, int, std::vector<std::shared_ptr<cpu::Window>>, double, std::optional<uint64_t>>(),
          py::kw_only(), py::arg("shape"), py::arg("rank"), py::arg("windows"), py::arg("timeout_s"),
          py::arg("network_seed"))
      .def("dispatch", &dispatch, no_gil, py::kw_only(), py::arg("lane"), py::arg("slot"), py::arg("x"),
           py::arg("x_pitch"), py::arg("num_tokens"), py::arg("payload_bytes"), py::arg("scales"),
           py::arg("scales_pitch"), py::arg("scale_bytes"), py::arg("format_code"), py::arg("topk_idx"),
           py::arg("topk_idx_bytes"), py::arg("topk_weights"), py::arg("cast"), py::arg("scale_format"),
           py::arg("zero_padding"), py::arg("fixed_shapes"), py::arg("cached"))
      .def("combine", &combine, no_gil, py::kw_only(), py::arg("lane"), py::arg("rows"), py::arg("side"),
           py::arg("weighted"), py::arg("with_side"), py::arg("out"), py::arg("side_out"), py::arg("handle"))
      .def(
          "receive_dispatch",
          [](cpu::Rank& rank, cpu::DispatchCall& call, uintptr_t owned_rows, uintptr_t owned_scales,
             uintptr_t column_scales, int64_t column_words) {
            rank.receive(call, {writable(owned_rows), writable(owned_scales)},
                         {static_cast<uint32_t*>(writable(column_scales)), column_words});
          },
          no_gil, py::arg("call"), py::kw_only(), py::arg("owned_rows"), py::arg("owned_scales"),
          py::arg("column_scales"), py::arg("column_words"))
      .def("receive_combine", py::overload_cast<cpu::CombineCall&>(&cpu::Rank::receive), no_gil, py::arg("call"))
      .def("release", &cpu::Rank::release, no_gil, py::arg("call"))
      .def("close", &cpu::Rank::close, no_gil)
      .def("check", [](cpu::Rank& rank) { rank.transport().throw_if_aborted(); })
      .def_property_readonly("shm_bytes", [](cpu::Rank& rank) { return rank.transport().shm_bytes(); })
      .def_property_readonly("network_bytes", [](cpu::Rank& rank) { return rank.transport().network_bytes(); });
}

void bind_row_math(py::module_& m) {
  m.def(
      "cast_rows",
      [](uintptr_t rows, int num_rows, int hidden, da::Cast cast, da::ScaleFormat format, uintptr_t payload,
         uintptr_t scales, int64_t scales_pitch) {
        const auto* from = static_cast<const uint16_t*>(pointer(rows));
        for (int64_t row = 0; row < num_rows; ++row) {
          cpu::cast_row(from + row * hidden, hidden, cast, format,
                        static_cast<uint8_t*>(writable(payload)) + row * hidden,
                        static_cast<char*>(writable(scales)) + row * scales_pitch);
        }
      },
      py::kw_only(), py::arg("rows"), py::arg("num_rows"), py::arg("hidden"), py::arg("cast"), py::arg("scale_format"),
      py::arg("payload"), py::arg("scales"), py::arg("scales_pitch"), "The cast that dispatch does, for tests.");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The CPU backend of deep_a2a: the protocol over shared memory.";
  da::bind_errors();
  m.attr("SCALE_ALIGNMENT") = da::kScaleAlignment;
  m.attr("STAGED_ROUNDS") = da::kStagedRounds;
  bind_shape(m);
  bind_window(m);
  bind_received(m);
  bind_calls(m);
  bind_rank(m);
  bind_row_math(m);
}
