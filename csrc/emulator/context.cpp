#include "emulator/context.hpp"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace deep_a2a::emulator {
namespace {

#if defined(DEEP_A2A_OWN_SWITCH)

void prepare(Context* context, char* stack, size_t stack_bytes, void (*entry)()) {
  const auto end = (reinterpret_cast<uintptr_t>(stack) + stack_bytes) & ~uintptr_t{15};
  auto* top = reinterpret_cast<void**>(end);
  *--top = nullptr;  // where entry would return to; with it the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context->stack_pointer = top;
}

// Only what a callee has to preserve: to the compiler this is a call like any other.
__attribute__((naked, noinline)) void switch_to(Context*, Context*) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq (%rsi), %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}

#else

void prepare(Context* context, char* stack, size_t stack_bytes, void (*entry)()) {
  getcontext(&context->state);
  context->state.uc_stack.ss_sp = stack;
  context->state.uc_stack.ss_size = stack_bytes;
  context->state.uc_link = nullptr;
  makecontext(&context->state, entry, 0);
}

void switch_to(Context* from, Context* to) { swapcontext(&from->state, &to->state); }

#endif

}  // namespace

#if defined(__SANITIZE_ADDRESS__)

// The sanitizer has to know where the stacks are, and to forget the frames of fibers that were left without unwinding.
void prepare_context(Context* context, char* stack, size_t stack_bytes, void (*entry)()) {
  ASAN_UNPOISON_MEMORY_REGION(stack, stack_bytes);
  context->stack = stack;
  context->stack_bytes = stack_bytes;
  prepare(context, stack, stack_bytes, entry);
}

void begin_context(Context* from) { __sanitizer_finish_switch_fiber(nullptr, &from->stack, &from->stack_bytes); }

void switch_context(Context* from, Context* to) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, to->stack, to->stack_bytes);
  switch_to(from, to);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

#else

void prepare_context(Context* context, char* stack, size_t stack_bytes, void (*entry)()) {
  prepare(context, stack, stack_bytes, entry);
}

void begin_context(Context*) {}

void switch_context(Context* from, Context* to) { switch_to(from, to); }

#endif

}  // namespace deep_a2a::emulator
