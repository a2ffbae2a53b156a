// The end of windows. A window may be freed when no other process maps it any more; but destroy() waits for nobody. So
// a rank says in each peer's window that it has done with it, and keeps its own until all peers have said so.
#pragma once

#include <memory>
#include <vector>

#include "cuda/window.hpp"
#include "protocol/layout.hpp"

namespace deep_a2a::cuda {

// Tells the peers. Theirs may be dropped afterwards; the own one is kept here as long as it has to be, at most until
// the process ends (where a peer was killed).
void say_farewell(const Shape& shape, int rank, int device, const std::vector<std::shared_ptr<Window>>& windows);

// Drops what nobody uses any more. Called before new windows are made.
void drop_unused_windows();

}  // namespace deep_a2a::cuda
