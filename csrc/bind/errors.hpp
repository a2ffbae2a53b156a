// How errors reach Python, the same for all modules.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>

#include "common/errors.hpp"

namespace deep_a2a {

// The exceptions are Python's, so that all backends raise the same ones.
inline void bind_errors() {
  pybind11::register_local_exception_translator([](std::exception_ptr error) {
    try {
      std::rethrow_exception(error);
    } catch (const CommError& e) {
      const pybind11::object type = pybind11::module_::import("deep_a2a.errors").attr(e.name());
      PyErr_SetString(type.ptr(), e.what());
    }
  });
}

}  // namespace deep_a2a
