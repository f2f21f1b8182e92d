#include "transfer/engine.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "error.h"
#include "transfer/schedule.h"
#include "transfer/workers.h"

namespace dcp_fast::transfer {

namespace {

class TaskRunner {
 public:
  TaskRunner(const Program& program, const Schedule& schedule, const std::vector<Policy>& policies)
      : program_(program),
        schedule_(schedule),
        policies_(policies),
        files_(program.layouts().paths, program.layouts().modes) {}

  void run(const Task& task, Worker& worker) {
    const Piece* piece = &schedule_.pieces[task.first_piece];
    try {
      const io::File& file = worker.open(files_, task.file);
      if (task.pieces == 1) {
        read(policies_[task.file], file, worker, piece->loops, 0, piece->source, piece->destination);
        return;
      }
      const Piece& last = piece[task.pieces - 1];
      const int64_t begin = piece->source;
      const int64_t size = last.source + box::source_span(last.loops) - begin;
      const std::byte* data = file.read_staged(worker.buffer, static_cast<size_t>(size), begin, *worker.counters);
      for (const Piece* each = piece; each <= &last; ++each) {
        box::copy(each->destination, data + (each->source - begin), each->loops.data(), each->loops.size());
      }
    } catch (Error& error) {
      error.item = static_cast<int64_t>(piece->item);
      error.record = static_cast<int64_t>(program_.items()[piece->item].record);
      throw;
    }
  }

 private:
  static void read(const Policy& policy, const io::File& file, Worker& worker, const box::Loops& loops, size_t level,
                   int64_t source, std::byte* destination) {
    const size_t depth = loops.size() - level;
    if (policy.reads_through(loops, level)) {
      const auto span = static_cast<size_t>(box::source_span(loops, level));
      const std::byte* data = file.read_staged(worker.buffer, span, source, *worker.counters);
      box::copy(destination, data, loops.data() + level, depth);
      return;
    }
    const box::Dim& outer = loops[level];
    if (depth == 1) {
      file.read_exactly(destination, static_cast<size_t>(outer.size), source, *worker.counters);
      return;
    }
    for (int64_t i = 0; i < outer.size; ++i) {
      read(policy, file, worker, loops, level + 1, source + i * outer.source_stride,
           destination + i * outer.destination_stride);
    }
  }

  const Program& program_;
  const Schedule& schedule_;
  const std::vector<Policy>& policies_;
  Files files_;
};

}  // namespace

Stats run_wave(const Program& program, int32_t wave, const Options& options, const std::function<bool()>& interrupted) {
  const Layouts& layouts = program.layouts();
  const Settled settled = settle(options, layouts.any_direct());
  std::vector<Policy> policies;
  policies.reserve(layouts.modes.size());
  for (const io::IoMode mode : layouts.modes) {
    policies.push_back({request_cost(mode), settled.block_bytes, mode == io::IoMode::kDirect});
  }

  Stats stats;
  std::vector<Copy> copies;
  for (size_t i = 0; i < program.items().size(); ++i) {
    const Transfer& transfer = program.transfers()[i];
    if (transfer.kind != Transfer::Kind::kDirect || transfer.wave != wave || transfer.loops.empty()) continue;
    const size_t file = layouts.records[program.items()[i].record].file;
    copies.push_back({file, {transfer.source, transfer.destination, i, transfer.loops}});
    stats.bytes_placed += box::volume(transfer.loops);
  }
  const Schedule schedule = make_schedule(std::move(copies), policies);
  TaskRunner runner(program, schedule, policies);
  io::IoCounters counters;
  run_parallel(schedule.tasks.size(), settled.threads, counters, interrupted,
               [&](size_t task, Worker& worker) { runner.run(schedule.tasks[task], worker); });
  stats.requests = counters.requests;
  stats.bytes_read = counters.bytes;
  return stats;
}

}  // namespace dcp_fast::transfer
