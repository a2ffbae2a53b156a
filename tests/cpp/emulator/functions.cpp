// Functions on bits and numbers, atomics, casts.
#include <cmath>
#include <limits>

#include "cuda/ptx.cuh"
#include "harness.hpp"

namespace deep_a2a::emulator_test {
namespace {

namespace ptx = cuda::ptx;

template <class T>
__global__ void atomics(T* words) {
  const T self = static_cast<T>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(words, T{2});
  atomicMin(words + 1, self);
  atomicMax(words + 2, self);
  atomicOr(words + 3, T{1} << (self % 31));
  const T before = atomicExch(words + 4, self + 1);
  atomicAdd(words + 5, before);
  while (atomicCAS(words + 6, T{0}, T{1}) != 0) {  // a lock
  }
  const T inside = words[7];
  __nanosleep(1);
  words[7] = inside + 1;
  __threadfence();
  atomicExch(words + 6, T{0});
}

template <class T>
void check_atomics() {
  constexpr T kThreads = 3 * 40;
  Array<T> words(8, T{});
  words[1] = kThreads;
  run_well(atomics<T>, 3, 40, 0, words.get());
  expect_equal(words[0], 2 * kThreads, "atomicAdd");
  expect_equal(words[1], T{0}, "atomicMin");
  expect_equal(words[2], kThreads - 1, "atomicMax");
  expect_equal(words[3], static_cast<T>(0x7FFFFFFF), "atomicOr");
  expect_equal(words[4] + words[5], kThreads * (kThreads + 1) / 2, "atomicExch");
  expect_equal(words[7], kThreads, "atomicCAS");
}

__global__ void words_and_time(uint64_t* words, float* number, int32_t* whole, uint32_t* half) {
  const uint64_t start = ptx::global_timer();
  ptx::st_release_sys(words, 5);
  words[1] = ptx::ld_acquire_sys(words) + ptx::ld_relaxed_sys(words);
  number[1] = ptx::ld_relaxed_sys(number);
  whole[1] = ptx::ld_relaxed_sys(whole);
  *half = 7;
  half[1] = ptx::ld_acquire_gpu(half) + ptx::atom_exch_acq_rel_gpu(half, 9) + ptx::atom_add_acq_rel_gpu(half, 1);
  half[2] = ptx::shared_address(ptx::dynamic_shared() + 16) - ptx::shared_address(ptx::dynamic_shared());
  auto* shared = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  ptx::async_load<4>(shared + 4, half + 1);
  ptx::async_load<16>(shared, half);
  ptx::async_wait();
  half[3] = shared[0] + shared[1] + shared[4];
  ptx::fence_acq_rel_sys();
  __threadfence_system();
  words[2] = ptx::global_timer() - start < 60000000000u;
}

void check_arithmetic() {
  expect_equal(__popc(0xF0F00001u), 9, "__popc");
  expect_equal(__popcll(~0ull), 64, "__popcll");
  expect_equal(__ffs(0) * 100 + __ffs(8), 4, "__ffs");
  expect_equal(__ffsll(1ll << 40), 41, "__ffsll");
  expect_equal(__clz(0) * 100 + __clz(1), 3231, "__clz");
  expect_equal(__clzll(0) * 100 + __clzll(1), 6463, "__clzll");
  expect_equal(__brev(0x80000003u), 0xC0000001u, "__brev");
  expect_equal(__fmaf_rn(0x1.000002p0f, 0x1.000002p0f, -0x1.000004p0f), 0x1p-46f, "__fmaf_rn");
  expect_equal(__fadd_rn(1.0f, 0x1p-25f), 1.0f, "__fadd_rn");
  expect_equal(__fmul_rn(3.0f, 0.5f) + __fdiv_rn(1.0f, 4.0f) + __frcp_rn(8.0f), 1.875f,
               "__fmul_rn, __fdiv_rn, __frcp_rn");
  expect_equal(__float_as_uint(1.0f), 0x3F800000u, "__float_as_uint");
  expect_equal(__float_as_int(-0.0f), std::numeric_limits<int>::min(), "__float_as_int");
  expect_equal(__uint_as_float(0x40000000u) + __int_as_float(0x40400000), 5.0f, "__uint_as_float, __int_as_float");
  expect_equal(min(3, 5u) + max(int64_t{2}, 7) + min(1.5f, 2.0f), 11.5f, "min, max");
}

void check_casts() {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  expect_equal(ptx::float2_to_bf16x2(1.0f, -2.0f), 0xC0003F80u, "bf16");
  expect_equal(ptx::float2_to_bf16x2(0x1.01p0f, nan), 0x7FFF3F80u, "bf16: a tie goes to even, NaN has one code");
  expect_equal(ptx::float2_to_e4m3x2(448.0f, -infinity), 0xFE7Eu, "e4m3 saturates");
  expect_equal(ptx::float2_to_e4m3x2(nan, 0x1p-9f), 0x017Fu, "e4m3: NaN and the smallest number");
  expect_equal(ptx::float2_to_e4m3x2(-0.0f, 1.0f), 0x3880u, "e4m3: zero keeps its sign");
  expect_equal(ptx::float2_to_e5m2x2(57344.0f, 1e6f), 0x7B7Bu, "e5m2 saturates");
  expect_equal(ptx::float2_to_e5m2x2(nan, -1.0f), 0xBC7Fu, "e5m2: NaN");
}

}  // namespace

void test_functions() {
  check_arithmetic();
  check_casts();
  for (uint64_t seed = 0; seed < 5; ++seed) {
    emulator::set_seed(seed);
    check_atomics<int>();
    check_atomics<unsigned>();
    check_atomics<unsigned long long>();
  }
  Array<uint64_t> words(3);
  Array<float> number(2, 1.5f);
  Array<int32_t> whole(2, -3);
  Array<uint32_t> half(4);
  run_well(words_and_time, 1, 1, 64, words.get(), number.get(), whole.get(), half.get());
  expect_equal(words[1] * 10 + words[2], 101u, "loads and stores of words, and the timer");
  expect_equal(number[1] + static_cast<float>(whole[1]), -1.5f, "relaxed loads");
  expect_equal(half[1] + half[2] * 1000, 7u + 7u + 9u + 16000u, "atomics of ptx, and shared addresses");
  expect_equal(half[3], half[0] + 2 * half[1], "async loads");
}

}  // namespace deep_a2a::emulator_test
