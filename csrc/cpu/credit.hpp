// Credits: who has finished with what. The only permission to overwrite anything in another rank's window.
#pragma once

#include "cpu/transport.hpp"

namespace deep_a2a::cpu {

// D0, C0: every rank that this one will write to has finished its previous operation on the lane.
void wait_lane_credit(Transport& transport, const Turn& turn, Step step);
// Finish: this rank is done with its epoch, all its reads and writes included.
void give_lane_credit(Transport& transport, const Turn& turn);
// Behind it, C5: every rank of the node has done the same, so that it has read this rank's rows.
void wait_rows_read(Transport& transport, const Turn& turn, Step step);

// D0: every rank of the node has freed the slot `releases` times.
void wait_slot_credit(Transport& transport, const Turn& turn, int slot, uint64_t releases);
// The slot of this rank is free again, for the `releases`-th time.
void release_slot(Transport& transport, const Turn& turn, int slot, uint64_t releases);

}  // namespace deep_a2a::cpu
