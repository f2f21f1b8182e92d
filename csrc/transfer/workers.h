// A bounded pool of threads for one stage of a load. It lives only as long as the stage: nothing is left behind that a
// fork could break or that would spin while nothing loads.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "error.h"
#include "io/buffer.h"
#include "io/file.h"

namespace dcp_fast::transfer {

// The files of a load by index. A file is open while some worker reads it and closed when the last one has moved on, so
// that a checkpoint of thousands of files needs no more descriptors than there are workers.
class Files {
 public:
  Files(const std::vector<std::string>& paths, const std::vector<io::IoMode>& modes);

  // Thread-safe. Throws Error(kIo).
  std::shared_ptr<io::File> open(size_t file);
  io::IoMode mode(size_t file) const { return modes_[file]; }

 private:
  struct Slot {
    std::mutex mutex;
    std::weak_ptr<io::File> file;
  };
  const std::vector<std::string>& paths_;
  const std::vector<io::IoMode>& modes_;
  std::vector<Slot> slots_;
};

// What one thread keeps from task to task.
struct Worker {
  io::File& open(Files& files, size_t index);

  // For long tasks, between their requests. Throws Interrupted if the work is to stop.
  void stop_if_cancelled() const {
    if (cancelled()) throw Interrupted();
  }

  std::function<bool()> cancelled;
  io::AlignedBuffer buffer;
  std::vector<iovec> vectors;
  io::IoCounters* counters = nullptr;

 private:
  std::shared_ptr<io::File> file_;
  size_t file_index_ = SIZE_MAX;
};

// Tasks in groups, each of which is finished as a whole.
struct Groups {
  std::vector<size_t> tasks;           // how many each group has
  size_t at_once = 1;                  // a group begins when the one that is so many before it has been finished
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
