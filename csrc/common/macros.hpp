// What the protocol headers need to be compiled by g++ and by nvcc alike.
#pragma once

#if defined(__CUDACC__)
#define DEEP_A2A_HOST_DEVICE __host__ __device__
#else
#define DEEP_A2A_HOST_DEVICE
#endif
