// What a fault record means to the rank that reads it.
#pragma once

#include <cstdint>
#include <exception>
#include <vector>

#include "protocol/steps.hpp"
#include "protocol/topology.hpp"

namespace deep_a2a {

// The error that `rank` raises for a record. `begun` has the epoch that each rank has begun on the record's lane, or
// nothing where that is not known. Whom a rank waits for may itself be waiting: those who have not come to the
// operation at all are where to look.
std::exception_ptr error_of(const FaultRecord& record, int rank, const Topology& topology,
                            const std::vector<uint64_t>& begun);

}  // namespace deep_a2a
