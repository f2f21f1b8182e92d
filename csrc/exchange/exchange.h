// One rank's part in an exchange: it reads the units that it owns, packs them for the ranks that need them, and places
// what it receives.
//
// In a round each rank has a segment for each rank, which begins with a header and is padded to a multiple of the
// header's size. The header is for those who call the collectives. After it come the sender's units of that round, and
// then what it passes on as a relay. Of each unit come the needs that the receiver has in common with others, of each
// its boxes in order, and of each box the bytes that lie in the unit, in ascending order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "box/box.h"
#include "copy/convert.h"
#include "exchange/assignment.h"
#include "exchange/cost.h"
#include "exchange/job_needs.h"
#include "exchange/need.h"
#include "exchange/quantized_target.h"
#include "io/kept_source.h"
#include "transfer/engine.h"
#include "transfer/layouts.h"
#include "transfer/options.h"
#include "transfer/program.h"

namespace dcp_fast::exchange {

inline constexpr int64_t kHeaderBytes = 64;

// Where a box of the need goes on this rank.
struct LocalBox {
  int device = transfer::kHost;
  std::byte* destination = nullptr;
  box::Loops loops;
  std::optional<copy::Conversion> conversion;
  size_t record = 0;                         // of the layouts
  std::optional<QuantizedTarget> quantized;  // then it tells where the box goes
};

// What a rank needs, and where it goes.
struct LocalNeed {
  explicit LocalNeed(Need of_files) : need(std::move(of_files)) {}

  Need need;
  std::vector<LocalBox> boxes;  // by the numbers of the need's boxes
  int64_t converted_items = 0;
  int64_t bytes_left_out = 0;    // of headers, as memory for them is short
  std::vector<size_t> left_out;  // records for which it is

  // Whether all boxes are for one device, and none for the host.
  bool is_on(int device) const;

  // Ranges that are kept as they are arrive here.
  std::shared_ptr<std::byte> memory;
  std::vector<std::vector<io::KeptRange>> kept;  // by source
};

// The boxes of a wave of a program that the engine places. `names`: of the files of the program's sources, the same on
// all ranks. Throws std::out_of_range if there is no such wave.
LocalNeed need_of(const transfer::Program& program, int32_t wave, const std::vector<std::string>& names);

// The headers of all records, and `records` from beginning to end, as far as `most_bytes` of memory go. They are kept.
LocalNeed need_of_headers(const transfer::Layouts& layouts, const std::vector<size_t>& records, int64_t most_bytes,
                          const std::vector<std::string>& names, const transfer::Options& options);

// Records from beginning to end. They are kept.
LocalNeed need_of_records(const transfer::Layouts& layouts, const std::vector<size_t>& records,
                          const std::vector<std::string>& names);

// Elements that are dequantized as they arrive.
struct QuantizedElements {
  size_t record = 0;             // of the layouts
  int64_t begin = 0;             // of the first byte, in the record
  int64_t stored_row_bytes = 0;  // from row to row
  QuantizedTarget target;
};
// Throws std::invalid_argument if they do not lie in their record, or if a unit is larger than kMostGrain.
LocalNeed need_of_quantized(const transfer::Layouts& layouts, const std::vector<QuantizedElements>& elements,
                            const std::vector<std::string>& names);

// Has the layouts' sources take from memory what is kept.
void keep(transfer::Layouts& layouts, LocalNeed& local);

// Lets go of that memory. The sources take from it no more. Nobody has them open.
void drop(transfer::Layouts& layouts, LocalNeed& local);

// What one round came to on this rank.
struct RoundStats {
  transfer::Stats placed;
  int64_t requests = 0;
  int64_t bytes_read = 0;
};

class Exchange {
 public:
  // `needs`: all different ones, as they were decoded, on all ranks in the same order. `ranks.needs[rank]` is the own
  // one. `files`: of this rank's layouts, by source, as its LocalNeed has them; empty if it needs nothing. `limits`:
  // headers included, unless these take more than half of them. Throws std::invalid_argument, std::bad_alloc.
  Exchange(std::vector<Need> needs, const Ranks& ranks, uint32_t rank, const std::vector<NeededFile>& files,
           const RoundLimits& limits, const Network& network = {});

  const std::string& obstacle() const { return obstacle_; }
  // Throws std::logic_error if there is an obstacle.
  const Assignment& assignment() const;
  uint32_t rounds() const { return obstacle_.empty() ? assignment_->rounds() : 0; }
  // By rank, headers included.
  std::vector<int64_t> bytes_to_send(uint32_t round) const;
  std::vector<int64_t> bytes_to_receive(uint32_t round) const;

  // What each rank would read in all rounds together, gaps that are read through included, if its files were those of
  // `layouts`. Throws std::invalid_argument if these lack a file.
  std::vector<int64_t> bytes_to_read(const transfer::Layouts& layouts, const transfer::Options& options) const;

  // Reads the units of a round that this rank owns into `memory`, which has bytes_to_send() in the order of ranks, and
  // copies there what it passes on of what it `received` kRelayRounds before. Headers are left as they are. Throws as
  // transfer::run_wave does.
  void pack(uint32_t round, std::byte* memory, const std::byte* received, const transfer::Layouts& layouts,
            const transfer::Options& options, const std::function<bool()>& interrupted, RoundStats& stats) const;

  // Whether this rank passes on what it receives in a round, which is then needed on the host.
  bool passes_on(uint32_t round) const;

  // Places what was received in a round: on the device `cuda.received`, if that is one, or else in `memory`. Boxes that
  // are not for that device need it in `memory` too, which may be nullptr if there are none.
  transfer::Stats place(uint32_t round, const std::byte* memory, const transfer::Layouts& layouts,
                        const LocalNeed& local, const transfer::Options& options, const transfer::CudaTargets& cuda,
                        const std::function<bool()>& interrupted) const;

 private:
  struct Span;
  // Bytes of a unit that one rank sends to another one.
  struct Parcel {
    uint32_t unit = 0;
    uint32_t rank = 0;  // the other one
    const Share* share = nullptr;
    int64_t position = 0;  // in the memory of the round
  };

  const CommonNeed& common(const Share& share) const { return assignment_->job().needs[share.need]; }
  size_t ranks() const { return assignment_->job().nodes.size(); }
  // The units of an owner in a round.
  std::pair<const uint32_t*, const uint32_t*> units_of(uint32_t round, uint32_t owner) const;
  // What this rank sends as the owner, by unit, and then what it passes on, in the order in which it received that.
  std::vector<Parcel> parcels_to_send(uint32_t round) const;
  // What owners send, and then what relays do.
  std::vector<Parcel> parcels_to_receive(uint32_t round) const;
  // Calls `function(unit, share, relay)` for each share of this rank in the units of a round.
  template <typename Function>
  void each_own_share(uint32_t round, const Function& function) const;
  // By rank, headers included.
  std::vector<int64_t> segments(const std::vector<Parcel>& parcels) const;
  void find_positions(std::vector<Parcel>& parcels) const;
  std::vector<Span> spans_to_read(uint32_t round, uint32_t owner, const transfer::Layouts& layouts,
                                  const transfer::Limits& limits) const;

  const uint32_t rank_;
  std::string obstacle_;
  std::vector<size_t> sources_;  // of this rank by the number that all ranks have for a file
  std::unique_ptr<Assignment> assignment_;
  std::vector<const Group*> own_groups_;  // by common need: in which this rank is; nullptr if it has other needs
  size_t own_boxes_ = 0;
};

// What another rank's or this one's round is about.
struct Send {
  uint32_t round = 0;
  std::byte* memory = nullptr;
};
struct Receive {
  uint32_t round = 0;
  const std::byte* memory = nullptr;  // of Exchange::place
};

// Reads and packs one round while another one is placed. If both fail, the error of the placement is thrown.
RoundStats step(const Exchange& exchange, std::optional<Send> send, std::optional<Receive> receive,
                const transfer::Layouts& layouts, const LocalNeed& local, const transfer::Options& options,
                const transfer::CudaTargets& cuda, const std::function<bool()>& interrupted);

}  // namespace dcp_fast::exchange
