// The steps by name, and the record that a rank leaves behind when it gives up in one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deep_a2a {

enum class Step : int32_t {
  kD0Credit,
  kD0SlotCredit,
  kD2Exchange,
  kD3Bases,
  kD4SendNodes,
  kD5Relay,
  kD6Routes,
  kD6Sent,
  kD6Relayed,
  kD6Read,
  kC0Credit,
  kC2Gather,
  kC3Relay,
  kC4AddNodes,
  kC5CreditReturned,
  kGrid,
};

enum class Fault : int32_t {
  kTimeout,    // the peer did not come
  kMismatch,   // the peer came with another call
  kUnexpected  // the rank failed by itself
};

inline const char* step_name(Step step) {
  switch (step) {
    case Step::kD0Credit:
      return "D0 credit";
    case Step::kD0SlotCredit:
      return "D0 credit (slot)";
    case Step::kD2Exchange:
      return "D2 exchange";
    case Step::kD3Bases:
      return "D3 bases";
    case Step::kD4SendNodes:
      return "D4 send (other nodes)";
    case Step::kD5Relay:
      return "D5 relay";
    case Step::kD6Routes:
      return "D6 arrival (routing)";
    case Step::kD6Sent:
      return "D6 arrival (sent)";
    case Step::kD6Relayed:
      return "D6 arrival (relayed)";
    case Step::kD6Read:
      return "D6 arrival (rows read)";
    case Step::kC0Credit:
      return "C0 credit";
    case Step::kC2Gather:
      return "C2 gather";
    case Step::kC3Relay:
      return "C3 relay";
    case Step::kC4AddNodes:
      return "C4 add nodes";
    case Step::kC5CreditReturned:
      return "C5 credit returned";
    case Step::kGrid:
      return "grid (blocks of its own kernel)";
  }
  return "unknown step";
}

// Written by the first rank to give up into every rank's `faults` region, at the index of the writer.
struct FaultRecord {
  Fault fault;
  Step step;
  int32_t rank;  // who gave up
  int32_t peer;  // whom it waited for
  int32_t lane;
  uint32_t waited_ms;
  uint64_t epoch;
  uint64_t expected;  // epochs; tags for a mismatch
  uint64_t seen;
};
static_assert(sizeof(FaultRecord) == 48 && offsetof(FaultRecord, epoch) == 24);

}  // namespace deep_a2a
