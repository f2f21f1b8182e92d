// Carries out the tasks of a schedule: reads, slices, and places on host memory.
#pragma once

#include <vector>

#include "error.h"
#include "transfer/program.h"
#include "transfer/schedule.h"
#include "transfer/workers.h"

namespace dcp_fast::transfer {

class Reader {
 public:
  // `policies`: one for each file. Both must outlive the reader.
  Reader(const Program& program, const std::vector<Policy>& policies) : program_(program), policies_(policies) {}

  // Thread-safe. Throws Error with `record` and `item` set where they are known.
  void run(const Schedule& schedule, const Task& task, Worker& worker);

  // Adds to an error which item it concerns, and what Layouts::attribute adds.
  void attribute(Error& error, size_t item) const;

 private:
  const Program& program_;
  const std::vector<Policy>& policies_;
};

}  // namespace dcp_fast::transfer
