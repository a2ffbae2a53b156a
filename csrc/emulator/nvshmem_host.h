// See nvshmem.h, which has all of it.
#pragma once

#include "nvshmem.h"
