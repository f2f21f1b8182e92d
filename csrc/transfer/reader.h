// Carries out the tasks of a schedule: reads, slices, and places on host memory.
#pragma once

#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

#include "error.h"
#include "io/byte_source.h"
#include "transfer/schedule.h"
#include "transfer/workers.h"

namespace dcp_fast::transfer {

// Adds to an error which item it concerns, its record, and where that is stored.
using Attribute = std::function<void(Error&, size_t)>;

class Reader {
 public:
  // `policies`: one for each source. `attribute` is called with an item of a piece. All must outlive the reader.
  Reader(const io::ByteSources& sources, const std::vector<Policy>& policies, Attribute attribute)
      : sources_(sources), policies_(policies), attribute_(std::move(attribute)) {}

  // Thread-safe. Throws Error with `record` and `item` set where they are known.
  void run(const Schedule& schedule, const Task& task, Worker& worker);

  void attribute(Error& error, size_t item) const { attribute_(error, item); }

 private:
  const io::ByteSources& sources_;
  const std::vector<Policy>& policies_;
  const Attribute attribute_;
};

}  // namespace dcp_fast::transfer
