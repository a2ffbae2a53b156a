// Scales by column, as TMA descriptors and grouped GEMMs take them: what a receiver makes of the rows of scales in a
// slot.
#pragma once

#include <cstdint>

#include "protocol/wire.hpp"

namespace deep_a2a {

// Words of 4 bytes, [groups, columns, pitch]: an FP32 scale each, or four UE8M0 exponents, the first in the lowest
// byte. Layout kPadded has a group for each local expert, the others have one of all rows.
struct ColumnScales {
  uint32_t* words = nullptr;  // null where scales stay in rows
  int64_t pitch = 0;          // words from one column to the next: the rows of a group, in whole 16 bytes

  DEEP_A2A_HOST_DEVICE static int num_columns(const RowFormat& format) { return ceil_div(format.scale_bytes, 4); }
  // The bits of a row's last word that are scales; the others come out as 0.
  DEEP_A2A_HOST_DEVICE static uint32_t last_mask(const RowFormat& format) {
    return ~uint32_t{0} >> (32 - 8 * ((format.scale_bytes - 1) % 4 + 1));
  }
};

}  // namespace deep_a2a
