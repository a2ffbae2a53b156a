// Runs the ranks of the CPU backend as threads of one process over the same memory, so that a sanitizer sees every
// access to every window. Random shapes and routings, disturbed networks, two lanes at once; all results are checked.
//   protocol_driver [rounds per topology] [seed]
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/check.hpp"
#include "cpu/rank.hpp"
#include "protocol/numerics.hpp"

namespace deep_a2a::cpu {
namespace {

constexpr double kTimeoutS = 60.0;

// One micro-batch of all ranks: what goes in, and all that is needed to know what must come out.
struct Batch {
  std::vector<int> num_tokens;                 // by rank
  std::vector<std::vector<int32_t>> topk_idx;  // by rank: [tokens, topk]
  std::vector<std::vector<uint16_t>> x;        // by rank: [tokens, hidden], small integers, so that sums are exact
};

Shape random_shape(const Topology& topology, std::mt19937& random) {
  Shape shape;
  shape.topology = topology;
  shape.layout = static_cast<Layout>(random() % 3);
  shape.hidden = 8 * (1 + static_cast<int>(random() % 40));
  shape.num_experts = topology.num_ranks * (1 + static_cast<int>(random() % 4));
  shape.num_topk = 1 + static_cast<int>(random() % static_cast<unsigned>(std::min(shape.num_experts, 6)));
  shape.max_tokens = 1 + static_cast<int>(random() % 24);
  if (random() % 2 == 0) shape.chunk_bytes = 700;  // chunks of one row: several per stream
  if (random() % 10 == 0) {                        // enough for streaming stores
    shape.hidden = 8192;
    shape.max_tokens = 80;
  }
  if (random() % 3 != 0) shape.round_tokens = 1 + static_cast<int>(random() % static_cast<unsigned>(shape.max_tokens));
  if (shape.layout == Layout::kExpert) shape.expert_alignment = 1 + static_cast<int>(random() % 8);
  if (shape.layout == Layout::kPadded) shape.expert_capacity = shape.all_tokens();
  return shape;
}

Batch random_batch(const Shape& shape, std::mt19937& random) {
  Batch batch;
  std::vector<int32_t> experts(static_cast<size_t>(shape.num_experts));
  for (int expert = 0; expert < shape.num_experts; ++expert) experts[expert] = expert;
  const bool stay_home = random() % 3 == 0;  // nothing but credits goes between nodes then
  for (int rank = 0; rank < shape.topology.num_ranks; ++rank) {
    const int node = shape.topology.node_of(rank);
    const int tokens = random() % 5 == 0 ? 0 : static_cast<int>(random() % static_cast<unsigned>(shape.max_tokens + 1));
    batch.num_tokens.push_back(tokens);
    batch.topk_idx.emplace_back();
    batch.x.emplace_back();
    for (int token = 0; token < tokens; ++token) {
      std::shuffle(experts.begin(), experts.end(), random);
      for (int slot = 0; slot < shape.num_topk; ++slot) {
        const bool none = random() % 8 == 0 || (stay_home && shape.node_of_expert(experts[slot]) != node);
        batch.topk_idx.back().push_back(none ? -1 : experts[slot]);
      }
      for (int i = 0; i < shape.hidden; ++i) batch.x.back().push_back(float_to_bf16(static_cast<float>(random() % 8)));
    }
  }
  return batch;
}

template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) throw std::runtime_error(text(parts...));
}

// One rank's part: dispatch, check, send the rows back as they came, check the sums; then the same again, cached.
class RankThread {
 public:
  RankThread(Rank& rank, const Batch& batch, int lane) : rank_(rank), batch_(batch), lane_(lane) {}

  void run(bool cached_too) {
    refused();
    auto first = use(nullptr);
    if (cached_too) use(first->handle);
  }

 private:
  std::shared_ptr<DispatchCall> use(std::shared_ptr<Handle> cached) {
    auto call = dispatch(std::move(cached));
    combine(*call);
    combine(*call);  // at once: lent rows are written again as soon as the first has returned
    std::this_thread::yield();
    check_rows(*call->handle);  // leased: nobody may have written to them, however far the others are
    rank_.release(*call);
    return call;
  }

  // A bad expert on one rank: every rank refuses, and the lane goes on.
  void refused() {
    std::vector<int32_t> idx(static_cast<size_t>(shape().num_topk), self());
    if (self() == shape().topology.num_ranks - 1) idx.back() = shape().num_experts;
    std::vector<uint16_t> x(static_cast<size_t>(shape().hidden));
    auto call = rank_.dispatch(lane_, arguments(x, idx, 1), nullptr);
    try {
      call->sent->wait();
    } catch (const std::invalid_argument&) {
      return;
    }
    require(false, "rank ", self(), " did not refuse a bad expert");
  }

  DispatchArgs arguments(const std::vector<uint16_t>& x, const std::vector<int32_t>& topk_idx, int num_tokens) const {
    DispatchArgs args;
    args.x = x.data();
    args.x_pitch = shape().max_payload_bytes();
    args.topk_idx = topk_idx.data();
    args.topk_idx_bytes = 4;
    args.num_tokens = num_tokens;
    args.format = {static_cast<int32_t>(shape().max_payload_bytes()), 0};
    args.slot = lane_;  // each lane keeps to a slot of its own
    return args;
  }

  const Shape& shape() const { return rank_.transport().shape(); }
  int self() const { return rank_.transport().rank(); }

  std::shared_ptr<DispatchCall> dispatch(std::shared_ptr<Handle> cached) {
    const DispatchArgs args = arguments(batch_.x[self()], batch_.topk_idx[self()], batch_.num_tokens[self()]);
    auto call = rank_.dispatch(lane_, args, std::move(cached));
    rank_.receive(*call);
    call->received->wait();
    check_rows(*call->handle);
    return call;
  }

  const char* received_row(int64_t row) const {
    return rank_.transport().region(self(), Region::kRecvRows, lane_) + row * shape().max_payload_bytes();
  }

  // Rank rows come by source rank, then token; each token's rows are found where its routing says.
  void check_rows(const Handle& handle) {
    const int topk = shape().num_topk, first_expert = self() * shape().num_local_experts();
    int64_t rank_row = 0;
    for (int source = 0; source < shape().topology.num_ranks; ++source) {
      for (int token = 0; token < batch_.num_tokens[source]; ++token) {
        const int32_t* idx = &batch_.topk_idx[source][static_cast<size_t>(token) * topk];
        const auto here = [&](int32_t expert) {
          return expert >= first_expert && expert < first_expert + shape().num_local_experts();
        };
        if (!std::any_of(idx, idx + topk, here)) continue;
        const auto* sent = &batch_.x[source][static_cast<size_t>(token) * shape().hidden];
        for (int slot = 0; slot < topk; ++slot) {
          const int64_t entry = rank_row * topk + slot;
          const int32_t expected = here(idx[slot]) ? idx[slot] - first_expert : -1;
          require(handle.received.topk_idx[entry] == expected, "rank ", self(), " row ", rank_row, " slot ", slot,
                  ": expert ", handle.received.topk_idx[entry], ", expected ", expected);
          if (expected < 0) continue;
          const int64_t row = shape().layout == Layout::kRank ? rank_row : handle.received.expert_rows[entry];
          require(std::memcmp(received_row(row), sent, static_cast<size_t>(shape().max_payload_bytes())) == 0, "rank ",
                  self(), " row ", row, " differs from token ", token, " of rank ", source);
        }
        ++rank_row;
      }
    }
    require(handle.received.num_rank_rows == rank_row, "rank ", self(), " received ", handle.received.num_rank_rows,
            " rank rows, expected ", rank_row);
  }

  void combine(const DispatchCall& dispatched) {
    const size_t tokens = static_cast<size_t>(batch_.num_tokens[self()]);
    std::vector<uint16_t> out(tokens * shape().hidden, 0x7FC0);
    std::vector<float> side(static_cast<size_t>(shape().slot_rows()) * shape().num_topk,
                            static_cast<float>(self() + 1));
    std::vector<float> side_out(tokens * shape().num_topk, -1.0f);
    CombineArgs args;
    args.rows = received_row(0);
    if (shape().layout == Layout::kRank) {  // lent
      char* lent = rank_.transport().region(self(), Region::kCombineRows, lane_);
      std::memcpy(lent, args.rows,
                  static_cast<size_t>(dispatched.handle->received.num_rows * shape().max_payload_bytes()));
      args.rows = lent;
    }
    args.side = side.data();
    args.with_side = true;
    args.out = out.data();
    args.side_out = side_out.data();
    auto call = rank_.combine(lane_, args, dispatched.handle);
    rank_.receive(*call);
    call->received->wait();
    for (size_t token = 0; token < tokens; ++token) check_sum(token, out, side_out);
  }

  // Every rank (or every expert) of the token sent its row back unchanged.
  void check_sum(size_t token, const std::vector<uint16_t>& out, const std::vector<float>& side_out) {
    const int topk = shape().num_topk;
    const int32_t* idx = &batch_.topk_idx[self()][token * topk];
    int terms = 0;
    for (int slot = 0; slot < topk; ++slot) {
      const float expected = idx[slot] < 0 ? 0.0f : static_cast<float>(shape().rank_of_expert(idx[slot]) + 1);
      require(side_out[token * topk + slot] == expected, "side payload of token ", token, " slot ", slot);
      const bool counted =
          shape().layout == Layout::kRank && std::any_of(idx, idx + slot, [&](int32_t earlier) {
            return earlier >= 0 && shape().rank_of_expert(earlier) == shape().rank_of_expert(idx[slot]);
          });
      terms += idx[slot] >= 0 && !counted ? 1 : 0;
    }
    for (int i = 0; i < shape().hidden; ++i) {
      const float expected = static_cast<float>(terms) * bf16_to_float(batch_.x[self()][token * shape().hidden + i]);
      const float got = bf16_to_float(out[token * shape().hidden + i]);
      require(got == expected, "rank ", self(), " token ", token, " channel ", i, ": ", got, ", expected ", expected);
    }
  }

  Rank& rank_;
  const Batch& batch_;
  const int lane_;
};

void run_round(const Topology& topology, std::mt19937& random) {
  const Shape shape = random_shape(topology, random);
  std::vector<std::shared_ptr<Window>> windows;
  for (int rank = 0; rank < topology.num_ranks; ++rank) windows.push_back(Window::create(make_layout(shape).bytes));
  const std::optional<uint64_t> seed = random() % 4 == 0 ? std::nullopt : std::optional<uint64_t>(random());
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int rank = 0; rank < topology.num_ranks; ++rank) {
    ranks.push_back(std::make_unique<Rank>(shape, rank, windows, kTimeoutS, seed));
  }
  for (int repeat = 0; repeat < 3; ++repeat) {
    const std::vector<Batch> batches = {random_batch(shape, random), random_batch(shape, random)};
    const bool cached_too = random() % 2 == 0;
    std::vector<std::thread> threads;
    std::vector<std::string> errors(static_cast<size_t>(topology.num_ranks) * batches.size());
    for (size_t idx = 0; idx < errors.size(); ++idx) {
      threads.emplace_back([&, idx] {
        const int lane = static_cast<int>(idx % batches.size());
        try {
          RankThread(*ranks[idx / batches.size()], batches[lane], lane).run(cached_too);
        } catch (const std::exception& error) {
          errors[idx] = error.what();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::string& error : errors) require(error.empty(), error);
  }
}

}  // namespace
}  // namespace deep_a2a::cpu

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1;
  const deep_a2a::Topology topologies[] = {{1, 1}, {8, 8}, {8, 4}, {8, 2}, {8, 1}, {6, 3}};  // ranks, ranks per node
  int passed = 0;
  for (const deep_a2a::Topology& topology : topologies) {
    for (int round = 0; round < rounds; ++round) {
      std::mt19937 random(seed * 1000003u + static_cast<unsigned>(round) * 101u +
                          static_cast<unsigned>(topology.num_ranks));
      try {
        deep_a2a::cpu::run_round(topology, random);
      } catch (const std::exception& error) {
        std::printf("%d ranks, %d per node, round %d: %s\n", topology.num_ranks, topology.ranks_per_node, round,
                    error.what());
        std::printf("%d passed, 1 failed\n", passed);
        return 1;
      }
      ++passed;
    }
  }
  std::printf("%d passed, 0 failed\n", passed);
  return 0;
}
