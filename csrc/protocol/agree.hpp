// Whether a dispatch may go ahead: a question that every rank answers from the same count vectors, in the same way.
#pragma once

#include <cstdint>
#include <exception>
#include <vector>

#include "protocol/wire.hpp"

namespace deep_a2a {

// The count vectors of all ranks, as they lie in the window.
class AllCounts {
 public:
  AllCounts(const Shape& shape, char* region) : shape_(shape), region_(region) {}
  CountVector of(int rank) const { return CountVector::at(shape_, region_ + rank * CountVector::bytes(shape_)); }

 private:
  const Shape& shape_;
  char* region_;
};

// What all ranks, looking at the same counts, decide in the same way.
struct Verdict {
  std::exception_ptr refusal;   // null: go ahead
  bool slots_disagree = false;  // leases differ between ranks: no later dispatch could agree either
};
Verdict agree(const Shape& shape, const AllCounts& counts);

// By expert, from all ranks together.
std::vector<int64_t> tokens_per_expert(const Shape& shape, const AllCounts& counts);

}  // namespace deep_a2a
