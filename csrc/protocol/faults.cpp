#include "protocol/faults.hpp"

#include <string>

#include "common/check.hpp"
#include "common/errors.hpp"

namespace deep_a2a {
namespace {

std::string late_ranks(const FaultRecord& record, const std::vector<uint64_t>& begun) {
  if (begun.empty()) return "";
  std::string ranks;
  for (size_t rank = 0; rank < begun.size(); ++rank) {
    if (begun[rank] < record.epoch) ranks += text(ranks.empty() ? "" : ", ", rank);
  }
  return ranks.empty() ? "; every rank has begun this operation" : "; not begun by rank " + ranks;
}

std::string describe(const FaultRecord& record, const Topology& topology, const std::vector<uint64_t>& begun) {
  const auto named = [&](int rank) { return text("rank ", rank, " (node ", topology.node_of(rank), ")"); };
  const std::string where = text(" (lane ", record.lane, ", epoch ", record.epoch, ")");
  const std::string who = named(record.rank), whom = named(record.peer), step = step_name(record.step);
  switch (record.fault) {
    case Fault::kUnexpected:
      return text(who, " failed by itself, see its own error", where);
    case Fault::kMismatch:
      return text(who, " found in step ", step, " that ", whom,
                  " was called differently (handle, slot, dtype of x, side, or the number of SMs): expected ",
                  record.expected, ", seen ", record.seen, where);
    case Fault::kTimeout:
      break;
  }
  return text(who, " gave up in step ", step, " after ", record.waited_ms / 1000.0, " s waiting for ", whom,
              ": expected ", record.expected, ", seen ", record.seen, where, late_ranks(record, begun));
}

}  // namespace

std::exception_ptr error_of(const FaultRecord& record, int rank, const Topology& topology,
                            const std::vector<uint64_t>& begun) {
  const std::string what = describe(record, topology, begun);
  if (record.rank != rank) {
    return std::make_exception_ptr(
        PeerAbortError(text("rank ", rank, " stopped because another rank gave up: ", what)));
  }
  if (record.fault == Fault::kMismatch) return std::make_exception_ptr(MismatchError(what));
  return std::make_exception_ptr(CommTimeoutError(what));
}

}  // namespace deep_a2a
