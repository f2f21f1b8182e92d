// Carries out the tasks of a schedule: reads, slices, and places on host memory.
#pragma once

#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

#include "error.h"
#include "transfer/layouts.h"
#include "transfer/schedule.h"
#include "transfer/workers.h"

namespace dcp_fast::transfer {

class Reader {
 public:
  // `policies`: one for each file. `record_of(item)`: what an item of a piece is a part of. All must outlive the
  // reader.
  Reader(const Layouts& layouts, const std::vector<Policy>& policies, std::function<size_t(size_t)> record_of)
      : layouts_(layouts), policies_(policies), record_of_(std::move(record_of)) {}

  // Thread-safe. Throws Error with `record` and `item` set where they are known.
  void run(const Schedule& schedule, const Task& task, Worker& worker);

  // Adds to an error which item it concerns, and what Layouts::attribute adds.
  void attribute(Error& error, size_t item) const;

 private:
  const Layouts& layouts_;
  const std::vector<Policy>& policies_;
  const std::function<size_t(size_t)> record_of_;
};

}  // namespace dcp_fast::transfer
