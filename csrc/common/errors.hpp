// What an operation can end with. Each becomes the exception of the same name in deep_a2a/errors.py.
#pragma once

#include <stdexcept>
#include <string>

namespace deep_a2a {

struct CommError : std::runtime_error {
  using std::runtime_error::runtime_error;
  virtual const char* name() const { return "CommError"; }
};

struct CommTimeoutError : CommError {  // this rank gave up
  using CommError::CommError;
  const char* name() const override { return "CommTimeoutError"; }
};

struct PeerAbortError : CommError {  // another rank gave up
  using CommError::CommError;
  const char* name() const override { return "PeerAbortError"; }
};

struct CapacityError : CommError {  // a rank would receive more than its slot holds
  using CommError::CommError;
  const char* name() const override { return "CapacityError"; }
};

struct MismatchError : CommError {  // ranks were called with different settings
  using CommError::CommError;
  const char* name() const override { return "MismatchError"; }
};

}  // namespace deep_a2a
