// Bindings of the network, in modules that are built with DEEP_A2A_NETWORK.
#pragma once

#include <pybind11/pybind11.h>

namespace deep_a2a {

void bind_network(pybind11::module_& m);

}  // namespace deep_a2a
