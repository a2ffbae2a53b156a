// One rank of a buffer: its transport, its lanes, its slots. What the Python module and the C++ tests drive.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/combine.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/lane.hpp"

namespace deep_a2a::cpu {

// The two halves of an operation, launched apart or one after the other.
struct Halves {
  // The input may be overwritten, unless lent: peers read lent rows until received. A dispatch of more than two rounds
  // reads its input until received.
  std::shared_ptr<Event> sent;
  std::shared_ptr<Event> received;  // the output may be read; null until receive was launched
};

class DispatchCall : public Halves {
 public:
  std::shared_ptr<Handle> handle;
  std::shared_ptr<Received> result;  // the caller's copy of what the handle received
  std::shared_ptr<Event> counts;     // the sizes in both are known

 private:
  friend class Rank;
  std::shared_ptr<Dispatch> dispatch;
  int lane = 0;
};

class CombineCall : public Halves {
 private:
  friend class Rank;
  std::shared_ptr<Combine> combine;
  int lane = 0;
};

class Rank {
 public:
  Rank(const Shape& shape, int rank, std::vector<std::shared_ptr<Window>> windows, double timeout_s,
       std::optional<uint64_t> network_seed);

  ~Rank() { close(); }

  Transport& transport() { return transport_; }

  // Launch the send half; `cached` is null, or the handle to reuse.
  std::shared_ptr<DispatchCall> dispatch(int lane, const DispatchArgs& args, std::shared_ptr<Handle> cached);
  std::shared_ptr<CombineCall> combine(int lane, const CombineArgs& args, std::shared_ptr<Handle> handle);
  // Launch the receive half on the same lane.
  void receive(DispatchCall& call, const OwnedOutput& owned = {}, const ColumnScales& columns = {});
  void receive(CombineCall& call);
  // Gives the slot of a dispatch back once the lane has come to this point.
  void release(DispatchCall& call);
  // Runs what was launched, then stops the lanes: at most until the deadline. Later calls fail.
  void close();

 private:
  Lane& lane(int idx);
  // Work of an operation: on an error that its peers cannot see, tells them not to wait.
  std::function<void(const Turn&)> guarded(std::function<void(const Turn&)> work);
  void check(const DispatchArgs& args, const Handle* cached) const;

  Transport transport_;
  std::vector<uint64_t> slot_uses_;
  std::vector<std::unique_ptr<Lane>> lanes_;  // last: their threads use all of the above
};

}  // namespace deep_a2a::cpu
