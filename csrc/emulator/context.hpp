// A point of execution with a stack of its own.
#pragma once

#include <cstddef>

#if defined(__x86_64__)
#define DEEP_A2A_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace deep_a2a::emulator {

struct Context {
#if defined(DEEP_A2A_OWN_SWITCH)
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = nullptr;  // lowest address
  size_t stack_bytes = 0;
#endif
};

// The first switch to the context calls `entry`, which must never return.
void prepare_context(Context* context, char* stack, size_t stack_bytes, void (*entry)());

// The first thing that a new context does, with the context that it was switched from.
void begin_context(Context* from);

// Both contexts belong to the same OS thread. Floating point modes are not switched.
void switch_context(Context* from, Context* to);

// The context will soon be switched to.
inline void prefetch_context([[maybe_unused]] const Context& context) {
#if defined(DEEP_A2A_OWN_SWITCH)
  __builtin_prefetch(context.stack_pointer);
  __builtin_prefetch(static_cast<char*>(context.stack_pointer) + 64);
  __builtin_prefetch(static_cast<char*>(context.stack_pointer) + 128);
#endif
}

}  // namespace deep_a2a::emulator
