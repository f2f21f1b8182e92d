#include "driver/races.h"

#include <algorithm>
#include <sstream>
#include <utility>

namespace simcuda {

namespace {

const char* verb(Access access) { return access == Access::kWrite ? "write" : "read"; }

bool conflict(Access one, Access other) { return one == Access::kWrite || other == Access::kWrite; }

}  // namespace

Agent RaceDetector::add_agent() {
  const auto reusable = std::find_if(retired_.begin(), retired_.end(), [this](const Retired& retired) {
    return host_.includes(retired.agent, retired.last_epoch);
  });
  if (reusable == retired_.end()) return next_agent_++;
  const Agent agent = reusable->agent;
  retired_.erase(reusable);
  return agent;
}

void RaceDetector::retire_agent(Agent agent, uint64_t last_epoch) { retired_.push_back({agent, last_epoch}); }

void RaceDetector::host_waited_for(const VectorClock& clock) {
  host_.join(clock);
  ++knowledge_;
}

void RaceDetector::record(History& history, const std::shared_ptr<const Work>& work, Access access,
                          Intervals intervals) {
  if (!enabled_ || intervals.empty()) return;
  prune(history);
  const Interval range = bounds(intervals);
  auto& entries = history.entries_;
  for (const History::Entry& entry : entries) {
    if (entry.work == work || !conflict(entry.access, access) || !bounds(entry.intervals).overlaps(range)) continue;
    // A kernel is recorded late: what was recorded before may well come after it.
    if (entry.work->happened_before(work->clock) || work->happened_before(entry.work->clock)) continue;
    const Interval where = first_overlap(entry.intervals, intervals);
    if (where.size() > 0) report(entry, access, work->label, where);
  }
  // Whatever races with a covered earlier access races with this one as well.
  const bool contiguous = intervals.size() == 1;
  const auto covered = [&](const History::Entry& entry) {
    return contiguous && range.covers(bounds(entry.intervals)) &&
           (access == Access::kWrite || entry.access == Access::kRead) && entry.work != work &&
           entry.work->happened_before(work->clock) && kernels_.empty();
  };
  entries.erase(std::remove_if(entries.begin(), entries.end(), covered), entries.end());
  entries.push_back({work, access, std::move(intervals)});
}

void RaceDetector::check_host(History& history, Access access, Interval range, const std::string& who) {
  if (!enabled_) return;
  prune(history);
  for (const History::Entry& entry : history.entries_) {
    if (!conflict(entry.access, access) || entry.work->happened_before(host_)) continue;
    const Interval where = first_overlap(entry.intervals, {range});
    if (where.size() > 0) report(entry, access, who, where);
  }
}

const Work* RaceDetector::not_waited_for(History& history) {
  if (!enabled_) return nullptr;
  const auto found = std::find_if(history.entries_.begin(), history.entries_.end(),
                                  [this](const auto& entry) { return !entry.work->happened_before(host_); });
  return found == history.entries_.end() ? nullptr : found->work.get();
}

void RaceDetector::kernel_launched(const std::shared_ptr<const Work>& work) { kernels_.push_back(work); }

void RaceDetector::kernel_ended(const std::shared_ptr<const Work>& work) {
  kernels_.remove(work);
  ++knowledge_;
}

bool RaceDetector::settled(const Work& work) const {
  return work.happened_before(host_) && std::all_of(kernels_.begin(), kernels_.end(), [&](const auto& kernel) {
           return work.happened_before(kernel->clock);
         });
}

void RaceDetector::prune(History& history) {
  if (history.pruned_at_ == knowledge_) return;
  history.pruned_at_ = knowledge_;
  auto& entries = history.entries_;
  const auto forgotten = [this](const History::Entry& entry) { return settled(*entry.work); };
  entries.erase(std::remove_if(entries.begin(), entries.end(), forgotten), entries.end());
}

void RaceDetector::report(const History::Entry& earlier, Access access, const std::string& who, Interval where) {
  std::ostringstream text;
  text << "RACE: the " << verb(access) << " by " << who << " is not ordered with the " << verb(earlier.access) << " by "
       << earlier.work->label << ": " << where.size() << " bytes at 0x" << std::hex << where.begin;
  reports_.add(text.str());
}

}  // namespace simcuda
