// The part of the runtime API that is about events.
#include <atomic>
#include <unordered_map>

#include "emulator/runtime_error.hpp"
#include "emulator/stream.hpp"

namespace deep_a2a::emulator {
namespace {

struct Event {
  std::shared_ptr<Moment> moment;  // of the last recording
  bool has_time = true;
};

struct Events {
  std::mutex mutex;
  std::unordered_map<cudaEvent_t, Event> all;
};

Events& events() {
  static Events& instance = *new Events;
  return instance;
}

// Calls use(event) where it exists.
template <class Use>
cudaError_t with_event(cudaEvent_t handle, Use&& use) {
  const std::lock_guard<std::mutex> lock(events().mutex);
  const auto known = events().all.find(handle);
  return known == events().all.end() ? cudaErrorInvalidResourceHandle : use(known->second);
}

// Empty where nothing has been recorded, which counts as reached.
cudaError_t find_moment(cudaEvent_t handle, std::shared_ptr<Moment>& moment) {
  return with_event(handle, [&](const Event& event) {
    moment = event.moment;
    return cudaSuccess;
  });
}

cudaError_t record(cudaEvent_t handle, cudaStream_t stream) {
  auto moment = std::make_shared<Moment>();
  const cudaError_t found = with_event(handle, [&](Event& event) {
    event.moment = moment;
    return cudaSuccess;
  });
  if (found != cudaSuccess) return found;
  if (is_null_stream(stream)) {
    const cudaError_t error = submit(stream, [] { return cudaSuccess; });
    moment->reach(error);
    return error;
  }
  const std::shared_ptr<Stream> queue = find_stream(stream);
  if (queue != nullptr) return queue->record(moment);
  moment->reach(cudaErrorInvalidResourceHandle);
  return cudaErrorInvalidResourceHandle;
}

cudaError_t elapsed_time(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (milliseconds == nullptr) return cudaErrorInvalidValue;
  std::shared_ptr<Moment> moments[2];
  const cudaEvent_t handles[2] = {start, end};
  for (int i = 0; i < 2; ++i) {
    const cudaError_t found = with_event(handles[i], [&](const Event& event) {
      moments[i] = event.moment;
      return event.has_time && event.moment != nullptr ? cudaSuccess : cudaErrorInvalidResourceHandle;
    });
    if (found != cudaSuccess) return found;
  }
  for (const auto& moment : moments) {
    if (const cudaError_t error = moment->query(); error != cudaSuccess) return error;
  }
  const auto nanoseconds = static_cast<int64_t>(moments[1]->time_ns() - moments[0]->time_ns());
  *milliseconds = static_cast<float>(static_cast<double>(nanoseconds) * 1e-6);
  return cudaSuccess;
}

}  // namespace
}  // namespace deep_a2a::emulator

using deep_a2a::emulator::Moment;
using deep_a2a::emulator::remember;

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  if (event == nullptr) return remember(cudaErrorInvalidValue);
  static std::atomic<uintptr_t> num_created{0};
  *event = reinterpret_cast<cudaEvent_t>(++num_created);
  const std::lock_guard<std::mutex> lock(deep_a2a::emulator::events().mutex);
  deep_a2a::emulator::events().all[*event].has_time = (flags & cudaEventDisableTiming) == 0;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const std::lock_guard<std::mutex> lock(deep_a2a::emulator::events().mutex);
  return remember(deep_a2a::emulator::events().all.erase(event) == 1 ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return remember(deep_a2a::emulator::record(event, stream));
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  std::shared_ptr<Moment> moment;
  const cudaError_t found = deep_a2a::emulator::find_moment(event, moment);
  return remember(found != cudaSuccess || moment == nullptr ? found : moment->query());
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  std::shared_ptr<Moment> moment;
  const cudaError_t found = deep_a2a::emulator::find_moment(event, moment);
  return remember(found != cudaSuccess || moment == nullptr ? found : moment->wait());
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  return remember(deep_a2a::emulator::elapsed_time(milliseconds, start, end));
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  std::shared_ptr<Moment> moment;
  const cudaError_t found = deep_a2a::emulator::find_moment(event, moment);
  if (found != cudaSuccess || moment == nullptr) return remember(found);
  return remember(deep_a2a::emulator::submit(stream, [moment] { return moment->wait(); }));
}
