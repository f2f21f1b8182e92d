// A bounded pool of threads for one stage of a load. It lives only as long as the stage: nothing is left behind that a
// fork could break or that would spin while nothing loads.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <functional>
#include <vector>

#include "error.h"
#include "io/buffer.h"
#include "io/byte_source.h"

namespace dcp_fast::transfer {

// What one thread keeps from task to task.
struct Worker {
  // Keeps a source open until the next one is asked for.
  const io::ByteSource& open(io::ByteSource& source);

  // For long tasks, between their requests. Throws Interrupted if the work is to stop.
  void stop_if_cancelled() const {
    if (cancelled()) throw Interrupted();
  }

  std::function<bool()> cancelled;
  io::AlignedBuffer buffer;
  std::vector<iovec> vectors;
  io::MappedWindow window;  // of the open source
  io::IoCounters* counters = nullptr;

 private:
  io::OpenSource source_;
};

// Tasks in groups, each of which is finished as a whole.
struct Groups {
  std::vector<size_t> tasks;           // how many each group has
  std::vector<size_t> after;           // how many groups before each must have been finished when it begins
  std::function<void(size_t)> finish;  // called with a group on the calling thread, in order, when its tasks are done
};

// Runs body(group, task, worker) for every task, counted from 0 in each group, in ascending order as workers come free,
// on at most `threads` threads, and returns when all are done. The first exception cancels what has not started, and
// tasks that ask their worker, and is thrown here; `interrupted`, called on this thread ten times a second, cancels
// likewise and throws Interrupted. Where the system has no thread to give, the calling one does the work.
void run_parallel(const Groups& groups, int threads, io::IoCounters& counters, const std::function<bool()>& interrupted,
                  const std::function<void(size_t, size_t, Worker&)>& body);

// The same for tasks in [0, tasks) that nothing has to be finished for.
void run_parallel(size_t tasks, int threads, io::IoCounters& counters, const std::function<bool()>& interrupted,
                  const std::function<void(size_t, Worker&)>& body);

}  // namespace dcp_fast::transfer
