// Copies of rows that this core will not touch again: past the caches where the processor can, which saves reading the
// destination first.
#pragma once

#include <cstdint>

namespace deep_a2a::cpu {

// Inputs that fit a core's second-level cache are better left there for their receivers.
constexpr int64_t kStreamingInputBytes = 1 << 20;

// memcpy, by streaming stores. They are not ordered by a release store: streaming_fence() must come in between.
void copy_streaming(void* to, const void* from, int64_t bytes);
void streaming_fence();

}  // namespace deep_a2a::cpu
